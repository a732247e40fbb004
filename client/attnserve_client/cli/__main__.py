"""Run the command `attnserve` as `python -m attnserve_client.cli`."""

from attnserve_client.cli import main

if __name__ == "__main__":
    main()
