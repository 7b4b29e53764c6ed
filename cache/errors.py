"""The one exception that speaks to the user."""


class BadInput(Exception):
    """Something that the user can mend; the command line prints it in one line and exits with status 2."""
