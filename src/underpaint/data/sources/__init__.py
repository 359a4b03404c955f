"""Where images come from: a folder, an archive, parquet files, Hugging Face datasets, WebDataset shards.

A source lists what there is (names, splits, labels, numbers) and reads encoded bytes; it decodes nothing. A kind of its own
is a module with a function from the DATA argument to a `Listing`, and a line in `SOURCES` (`underpaint/files.py`).
"""
