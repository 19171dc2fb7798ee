"""Does the Hub answer? Knows one question with a deadline; fetches nothing."""

import os
import threading
import urllib.error
import urllib.request

from bitpress.engine.errors import BitpressError

DEADLINE_S = 3.0
TRUE = {"1", "true", "yes", "on"}


def require_hub(wanted: str, instead: str) -> None:
    """Return within three seconds if the Hub answers; otherwise raise BitpressError that names what was wanted and what to do instead."""
    if why := _why_not():
        raise BitpressError(f"{wanted} cannot be fetched.", why, instead)


def hub_answers() -> bool:
    """True when the Hub answers within three seconds. HF_HUB_OFFLINE is obeyed without a question being asked."""
    return _why_not() is None


def _why_not() -> str | None:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        return "HF_HUB_OFFLINE is set, so the Hub is not asked."
    answered = threading.Event()
    # A thread, because looking up a name can hang for far longer than any time-out of the request itself.
    threading.Thread(target=_ask, args=(answered,), daemon=True).start()
    return None if answered.wait(DEADLINE_S) else f"The Hub did not answer within {DEADLINE_S:.0f} s."


def _ask(answered: threading.Event) -> None:
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=DEADLINE_S):
            answered.set()
    except urllib.error.HTTPError:
        answered.set()  # a refusal is an answer
    except OSError:
        return
