"""The attnserve server. Rooms and their order are drawn in ARCHITECTURE.md."""
