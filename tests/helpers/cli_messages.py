"""What a user sees of a mistake on the command line."""

from __future__ import annotations

from hf_sparse_attn.cli.commands import app, guarded


def message_of(capsys, *arguments):
    """Standard error of one paragraph, exit code 1, nothing on standard output."""
    assert guarded(lambda: app([str(a) for a in arguments], standalone_mode=False)) == 1
    captured = capsys.readouterr()
    # after what transformers says while it loads, which `main` silences
    message = captured.err[captured.err.index("error: ") :]
    assert captured.out == "" and message.count("\n") == 1
    return message
