"""Which method for my images? Every method under the same wall-clock, judged alike."""
