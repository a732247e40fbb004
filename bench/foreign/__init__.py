"""Files that other people's tools write: made, converted, served, and compared with their sources."""
