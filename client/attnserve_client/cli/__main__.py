"""`python -m attnserve_client.cli` is the command `attnserve`."""

from attnserve_client.cli import main

if __name__ == "__main__":
    main()
