"""The data commands: each is run from the repository as `python -m data.NAME`; --help says what it does."""
