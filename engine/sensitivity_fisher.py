"""What a change would do, to second order, for all layers in one backward: no forward is repeated. Knows gradients; no options.

KL(p || p') = 1/2 dz' (diag p - p p') dz + O(dz^3) for a change dz of a position's logits. With r = sqrt(p) e - p <sqrt(p), e> and
random signs e, E[r r'] is just that matrix (Rademacher probes of the generalised Gauss-Newton matrix: Hutchinson 1990; Schraudolph 2002),
so one backward of r gives at every layer's output a gradient g with E[<g, dy>^2] = 2 KL for a change dy of that output.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from bitpress.engine.calibrate import computing_in
from bitpress.engine.errors import Cancelled
from bitpress.engine.measure.logits import plain_scorer, slices
from bitpress.engine.model.load import compute_dtype

WINDOW = 16  # positions whose products are added before they are squared
WINDOWS_AT_ONCE = 128
PIECE = 9 << 19  # numbers of outer products that are made at once: 9 MB in bfloat16
OnOutput = Callable[[str, Tensor, Tensor, Tensor], None]  # name, inputs x, outputs y, gradients g of the outputs


def listen(
    model: nn.Module,
    ids_SL: Tensor,
    modules: Mapping[str, nn.Module],
    on_output: OnOutput,
    embedding: nn.Module,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """One forward and one backward of random probes; `on_output` hears every named module once (a head once a slice of positions).

    ids_SL: int64 [S, L], all of it at once. Weights are cast to the type to compute in meanwhile. Gradients are of a sum over
    positions: <g, dy> of one position is comparable with that of another. Raises Cancelled when told to stop.
    """
    dtype = compute_dtype(ids_SL.device.type)
    generator = torch.Generator(ids_SL.device).manual_seed(seed)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(computing_in(model.parameters(), dtype))
        scorer = plain_scorer(model)
        stack.callback(embedding.register_forward_hook(lambda _, __, rows: rows.detach().requires_grad_()).remove)
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(_hearing(name, on_output, should_stop)).remove)
        hidden = scorer.hidden(ids_SL)
        gradient_PD = torch.empty_like(hidden).flatten(0, 1)
        for part in slices(len(gradient_PD), scorer.vocab):
            leaf_PD = hidden.detach().flatten(0, 1)[part].requires_grad_()
            logits_PV = scorer.logits(leaf_PD).float()
            gradient_PD[part] = torch.autograd.grad(logits_PV, leaf_PD, probe(logits_PV.detach(), generator))[0]
        hidden.backward(gradient_PD.view_as(hidden))


def probe(logits_PV: Tensor, generator: torch.Generator) -> Tensor:
    """r = sqrt(p) e - p <sqrt(p), e> for each position, e of random signs: E[r r'] = diag(p) - p p'."""
    p_PV = logits_PV.softmax(-1)
    signs = torch.randint(0, 2, p_PV.shape, generator=generator, device=p_PV.device, dtype=torch.int8)
    r_PV = p_PV.sqrt().mul_(signs.mul_(2).sub_(1))
    return r_PV.sub_(p_PV.mul_(r_PV.sum(-1, keepdim=True)))


def _hearing(name: str, on_output: OnOutput, should_stop: Callable[[], bool]) -> Callable[..., None]:
    def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        y = output if isinstance(output, Tensor) else output[0]
        x = args[0].detach()

        def backward(gradient: Tensor) -> None:
            if should_stop():
                raise Cancelled(remedy="Start it again; a backward takes seconds.")
            on_output(name, x, y.detach(), gradient.detach())

        if y.requires_grad:
            y.register_hook(backward)

    return forward


def in_windows(rows_SLN: Tensor) -> Tensor:
    """Windows of `WINDOW` positions, [W, WINDOW, N]; the last one of a sequence is filled up with rows of zeros."""
    padded = torch.nn.functional.pad(rows_SLN, (0, 0, 0, -rows_SLN.shape[1] % WINDOW))
    return padded.unflatten(1, (-1, WINDOW)).flatten(0, 1)


def window_products(x_WPK: Tensor, errors_ONK: Tensor, gradient_WPN: Tensor) -> Tensor:
    """sum of <g, D x> over each window's positions, for every error D: float32 [O, W].

    That is <D, sum of g x'>: the sum of outer products is made once for all errors, a piece at a time that stays in the cache.
    """
    (_, rows, columns), windows = errors_ONK.shape, len(x_WPK)
    sums_OW = torch.zeros((len(errors_ONK), windows), device=errors_ONK.device)
    for some in torch.arange(windows).split(WINDOWS_AT_ONCE):
        part = slice(int(some[0]), int(some[-1]) + 1)
        x_wPK, gradient_wNP = x_WPK[part], gradient_WPN[part].transpose(1, 2)
        step = max(1, PIECE // (len(some) * columns))
        for row in range(0, rows, step):
            outer_wnK = torch.bmm(gradient_wNP[:, row : row + step], x_wPK)
            sums_OW[:, part] += errors_ONK[:, row : row + step].flatten(1) @ outer_wnK.flatten(1).t()
    return sums_OW


def second_order(sums_W: Tensor) -> float:
    """1/2 sum of (sum of <g, dy> over a window of positions)^2: the KL divergence, in nats over all positions, that a change makes.

    Changes at several positions act on the same later predictions, so their products belong together; but the more of them one
    square holds, the more it scatters. Windows of 16 of 512 tokens followed the measured divergence best.
    """
    return 0.5 * float(sums_W.square().sum(dtype=torch.float64))


def stands_on(sums_W: Tensor) -> float:
    """How many windows a second-order score stands on: (sum q)^2 / sum q^2 of their squares q (Kish's effective sample size). 1 for none."""
    q = sums_W.double().square()
    return float(q.sum().square() / q.square().sum()) if q.any() else 1.0


def windows(shape: Sequence[int]) -> int:
    """How many windows sequences [S, L] have."""
    return shape[0] * -(-shape[1] // WINDOW)


def tied_head(model: nn.Module, embedding: nn.Module) -> tuple[str, nn.Module] | None:
    """The name and module of the head that shares the embedding's weight, None where there is none."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module.weight is embedding.weight)
    return next(found, None)
