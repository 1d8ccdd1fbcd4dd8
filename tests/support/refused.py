"""A call that must fail, and what its error must say."""

import pytest


def refused(says, call, *args, kind=ValueError, **named):
    """The error's text, if the call fails and says this (a regular expression)."""
    with pytest.raises(kind, match=says) as error:
        call(*args, **named)
    return str(error.value)
