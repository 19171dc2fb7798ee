"""The tokens that methods and sensitivity may look at, with what is needed to name and repeat them (METHODS 0.4). Knows texts and tokenizers."""

from dataclasses import dataclass

from torch import Tensor

from bitpress.engine.data.texts import load_text, resolve_text
from bitpress.engine.data.tokens import calibration_ids, ids_digest
from bitpress.engine.errors import InputError
from bitpress.engine.model import library
from bitpress.engine.model.load import Loaded
from bitpress.engine.recipe import Calibration


@dataclass(frozen=True)
class CalibrationSet:
    """ids_SL: int64 [S, L], S sequences of L tokens. text: its id. seed: of the draw. sha256: of the ids."""

    text: str
    seed: int
    sha256: str
    ids_SL: Tensor


def calibration_set(loaded: Loaded, wanted: Calibration, seed: int = 0) -> CalibrationSet:
    """Draw sequences from the calibration part of a text; sequences longer than the model's context are cut to it.

    Raises InputError for a text that cannot be calibrated on, BitpressError when it cannot be fetched.
    """
    entry = library.find(loaded.model_id)
    text, part = resolve_text(wanted.text, entry, "calibration")
    length = min(wanted.length, loaded.anatomy.context)
    ids_SL = calibration_ids(loaded.tokenizer, load_text(text, part), wanted.sequences, length, seed, entry.needs_bos)
    return CalibrationSet(text, seed, ids_digest(ids_SL), ids_SL)


def left_to_train(sequences: int, held_out: int) -> int:
    """How many of the text's sequences are trained on when so many are held out. Raises InputError when none is."""
    if sequences <= held_out:
        why = f"There are {sequences} calibration sequences, and {held_out} of them are held out."
        raise InputError("There is no text left to train on.", why, "Ask for more calibration sequences, or hold out fewer.")
    return sequences - held_out
