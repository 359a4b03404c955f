"""What is drawn: plots as SVG text for pages, and sheets of small pictures as PNG."""
