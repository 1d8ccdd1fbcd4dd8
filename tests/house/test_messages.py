"""Error messages: each is seen in a test or in a notebook, and reads as a sentence."""

from tests.support.messages import Message, is_shown, messages, shown

ALL = messages()
SAID_BY_OTHERS = {
    ("experiments/checkpoint.py", "write_tensors"): "hands on the system's own error",
    ("commands/federate.py", "local"): "adds where the programs' output is to an error of theirs",
    ("commands/federate.py", "server"): "the same",
}


def test_every_message_is_seen_in_a_test_or_a_notebook():
    corpus = shown()
    own = [one for one in ALL if one.how != "one_of" and one.long]
    own = [one for one in own if (one.module, one.function) not in SAID_BY_OTHERS]
    assert len(own) > 300
    unseen = [f"{one.module}:{one.line} {one.text}" for one in own if not is_shown(one, corpus)]
    assert not unseen, "\n".join(unseen)


def test_a_message_that_no_test_has_would_be_found():
    made_up = Message("core.py", 1, "f", "ValueError", ("the quokka ", " is not a wombat"))
    assert not is_shown(made_up, "a quokka is no wombat") and is_shown(made_up, "is not a wombat at all")


def test_what_must_be_is_a_phrase():
    """It follows "must be", so it neither says that again nor calls out."""
    allowed = [one for one in ALL if one.how == "require"]
    assert not [one for one in allowed if any("must be" in words or "!" in words for words in one.words[-1:])]
