"""What a student is asked for while it is trained beside its teacher (METHODS 12.3; Tao et al. 2022, section 3.1). Knows logits and hidden
states of tokens; no models and no weights.

Token-level contrast: each token of the student is pulled to the teacher's state of the same token and pushed from the teacher's states of
the other tokens of its sequence, so that tokens stay apart where few levels would make them alike. Shapes: S sequences of text, B of them
in a step, T tokens, d width, P positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize


def divergence(student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    """Sum over positions of KL(teacher || student) in nats."""
    return kl_div(student_PV.log_softmax(dim=-1), teacher_PV.log_softmax(dim=-1), log_target=True, reduction="sum")


def token_contrast(student_BTd: Tensor, teacher_BTd: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of -log softmax, at the own token, of cos(student, teacher) / temperature over the tokens of its sequence."""
    alike_BTT = normalize(student_BTd, dim=-1) @ normalize(teacher_BTd, dim=-1).transpose(1, 2) / temperature
    return -torch.diagonal(alike_BTT.log_softmax(dim=-1), dim1=1, dim2=2).mean()


class TokenBank:
    """The student's state of every token of the text, as a running mean over the steps that saw it."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.states_STd = torch.zeros(0, 0, 0)
        self.seen_S = torch.zeros(0, dtype=torch.bool)

    def blend(self, chosen_B: Tensor, sequences: int, student_BTd: Tensor) -> Tensor:
        """momentum * kept + (1 - momentum) * student, or the student alone where a sequence is new; what is kept has no gradient.

        chosen_B: which of the text's `sequences` these are, each at most once.
        """
        if not len(self.seen_S):
            self.states_STd = student_BTd.new_zeros(sequences, *student_BTd.shape[1:])
            self.seen_S = torch.zeros(sequences, dtype=torch.bool, device=student_BTd.device)
        weight_B11 = self.momentum * self.seen_S[chosen_B].to(student_BTd)[:, None, None]
        blended_BTd = weight_B11 * self.states_STd[chosen_B] + (1 - weight_B11) * student_BTd
        self.states_STd[chosen_B] = blended_BTd.detach()
        self.seen_S[chosen_B] = True
        return blended_BTd

    def state(self) -> dict[str, Tensor]:
        """What a resumed training needs of it."""
        return {"states": self.states_STd, "seen": self.seen_S}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        self.states_STd, self.seen_S = state["states"], state["seen"]
