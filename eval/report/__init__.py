"""What was recorded, as a page, as figures and as the tables of README.md."""
