"""The walk over the blocks, against plain forwards with hooks, on every family."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bitpress.engine.calibrate import walk
from bitpress.engine.errors import Cancelled, InputError
from bitpress.engine.model.inspect import anatomy_of
from bitpress.engine.model.surgery import get, linear_weight, replace, set_linear_weight
from bitpress.engine.statistics import STATISTICS

IDS = torch.randint(2, 300, (5, 40), generator=torch.Generator().manual_seed(1))  # 5 sequences: the last batch is a short one


def moments_by_hooks(model, names):
    """E[x^2] of every layer's input in one plain forward over all sequences."""
    found = {}

    def hook(name):
        def hear(module, args):
            found[name] = args[0].reshape(-1, args[0].shape[-1]).double().square().mean(0)

        return hear

    handles = [get(model, name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return found


def all_moments(model, anatomy, **options):
    """The walk's second moments of every layer."""
    found = {}
    requests = {part.name: {"second_moment"} for part in anatomy.linears}
    walk(model, anatomy, IDS, requests, lambda index, stats: found.update(stats), batch=2, **options)
    return {name: stats["second_moment"] for name, stats in found.items()}


@pytest.mark.parametrize("sequential", [True, False])
def test_moments_equal_those_of_a_plain_forward(any_tiny, sequential):
    name, model = any_tiny
    anatomy = anatomy_of(model, name)
    expected = moments_by_hooks(model, [part.name for part in anatomy.linears])
    found = all_moments(model, anatomy, sequential=sequential, dtype=torch.float32)
    assert found.keys() == expected.keys()
    for layer in expected:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-7)


def test_a_forward_for_statistics_ends_at_the_last_layer_that_was_asked_for(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    runs = {part.name: 0 for part in anatomy.linears}

    def count(name):
        def ran(*_):
            runs[name] += 1

        return ran

    handles = [get(model, name).register_forward_hook(count(name)) for name in runs]
    walk(model, anatomy, IDS, {part.name: {"second_moment"} for part in anatomy.linears if part.role == "o"}, lambda *_: None, batch=2)
    for handle in handles:
        handle.remove()
    last = max(part.block for part in anatomy.linears)
    entering = 1  # the first block also runs once to learn what blocks put out
    for part in anatomy.linears:
        statistics, outputs = (3 if part.role in "qkv" else 1), (3 if part.block < last else 0)
        assert runs[part.name] == statistics + outputs + (entering if part.block == 0 else 0), part.name


def test_gram_has_the_second_moments_on_its_diagonal_and_is_the_mean_outer_product(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    layer = anatomy.linears[-1].name
    found = {}
    walk(model, anatomy, IDS, {layer: {"gram", "second_moment"}}, lambda index, stats: found.update(stats), dtype=torch.float32)
    torch.testing.assert_close(found[layer]["gram"].diagonal(), found[layer]["second_moment"], rtol=1e-5, atol=1e-8)
    inputs = []
    handle = get(model, layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1).double()))
    model(input_ids=IDS)
    handle.remove()
    torch.testing.assert_close(found[layer]["gram"], inputs[0].t() @ inputs[0] / len(inputs[0]), rtol=1e-4, atol=1e-6)


def test_mean_sizes_and_peaks_are_those_of_all_rows(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    layer, found, inputs = anatomy.linears[-1].name, {}, []
    walk(model, anatomy, IDS, {layer: {"mean_abs", "peak"}}, lambda index, stats: found.update(stats), dtype=torch.float32)
    handle = get(model, layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1).double()))
    model(input_ids=IDS)
    handle.remove()
    torch.testing.assert_close(found[layer]["mean_abs"], inputs[0].abs().mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[layer]["peak"], inputs[0].abs().amax(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width", [7, 256, 600])
def test_a_gram_made_of_triangles_is_whole_and_symmetric(width):
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
    gram = STATISTICS["gram"]()
    gram.add(rows[:25])
    gram.add(rows[25:])
    made = gram.result()
    torch.testing.assert_close(made, rows.double().t() @ rows.double() / 40, rtol=1e-4, atol=1e-5)
    assert torch.equal(made, made.t())


def test_layers_that_read_one_tensor_share_one_statistic(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    q, k, v, o, gate, up, down = (part.name for part in anatomy.of_block(0))
    found = {}
    requests = {q: {"second_moment"}, k: {"second_moment", "gram"}, v: {"gram"}, o: {"second_moment"}, gate: {"gram"}, up: {"gram"}, down: {"gram"}}
    walk(model, anatomy, IDS, requests, lambda index, stats: found.update(stats))
    assert found[q]["second_moment"] is found[k]["second_moment"]
    assert found[k]["gram"] is found[v]["gram"]
    assert found[gate]["gram"] is found[up]["gram"]
    assert found[o]["second_moment"] is not found[q]["second_moment"]
    assert {name: set(stats) for name, stats in found.items()} == requests


@pytest.mark.parametrize("layer", ["k_proj", "v_proj"])
def test_an_edit_of_k_or_v_moves_the_next_block_and_the_logits(tiny_models, layer):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    before, logits = all_moments(model, anatomy), model(input_ids=IDS).logits
    edited = f"model.layers.0.self_attn.{layer}"
    after = {}

    def edit(index, stats):
        after.update(stats)
        if index == 0:
            set_linear_weight(get(model, edited), -linear_weight(get(model, edited)))

    requests = {part.name: {"second_moment"} for part in anatomy.linears}
    walk(model, anatomy, IDS, requests, edit, batch=2)
    assert all(torch.equal(after[part.name]["second_moment"], before[part.name]) for part in anatomy.of_block(0))
    next_layer = "model.layers.1.self_attn.q_proj"
    assert not torch.allclose(after[next_layer]["second_moment"], before[next_layer], rtol=1e-3)
    assert (model(input_ids=IDS).logits - logits).abs().max() > 0.01


def test_without_sequential_later_blocks_see_the_original(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    before, after = all_moments(model, anatomy), {}

    def erase(index, stats):
        after.update(stats)
        for part in anatomy.of_block(index):
            set_linear_weight(get(model, part.name), torch.zeros(part.out_features, part.in_features))

    requests = {part.name: {"second_moment"} for part in anatomy.linears}
    walk(model, anatomy, IDS, requests, erase, batch=2, sequential=False)
    assert all(torch.equal(after[name]["second_moment"], before[name]) for name in before)


def test_a_replaced_layer_is_what_the_next_block_sees(tiny_models):
    class Nothing(nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 64)

    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    found = {}

    def cut(index, stats):
        found.update(stats)
        if index == 0:
            replace(model, "model.layers.0.self_attn.o_proj", Nothing())
            replace(model, "model.layers.0.mlp.down_proj", Nothing())

    walk(model, anatomy, IDS, {"model.layers.1.self_attn.q_proj": {"second_moment"}}, cut, dtype=torch.float32)
    embedded = model.model.layers[1].input_layernorm(model.model.embed_tokens(IDS)).flatten(0, 1).double()
    torch.testing.assert_close(found["model.layers.1.self_attn.q_proj"]["second_moment"], embedded.square().mean(0), rtol=1e-4, atol=1e-7)


def test_weights_stored_in_bfloat16_are_computed_in_float32_and_put_back(tiny_models):
    stored = tiny_models("llama").to(torch.bfloat16)
    exact = tiny_models("llama").to(torch.bfloat16).float()
    anatomy = anatomy_of(stored, "tiny")
    pointers = {name: weight.data_ptr() for name, weight in stored.named_parameters()}
    found = all_moments(stored, anatomy, dtype=torch.float32)
    expected = moments_by_hooks(exact, list(found))
    for layer in found:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-7)
    assert {name: weight.data_ptr() for name, weight in stored.named_parameters()} == pointers
    assert all(weight.dtype == torch.bfloat16 for weight in stored.parameters())


def test_at_most_two_copies_of_the_hidden_states_live_at_once(tiny_models):
    model = tiny_models("llama")
    anatomy = anatomy_of(model, "tiny")
    alive: list[weakref.ref] = []
    most = 0

    def note(module, args, output):
        nonlocal most
        alive.extend([weakref.ref(args[0]), weakref.ref(output)])
        most = max(most, len({id(ref()) for ref in alive if ref() is not None}))

    handles = [block.register_forward_hook(note) for block in model.model.layers]
    walk(model, anatomy, IDS, {}, lambda index, stats: None, batch=1)
    for handle in handles:
        handle.remove()
    gc.collect()
    assert 5 <= most <= 10  # five batches of one sequence: one copy is five tensors
    assert not any(ref() is not None for ref in alive)


def test_the_model_is_as_it_was_after_a_cancelled_walk(tiny_models):
    model = tiny_models("gemma3").to(torch.bfloat16)
    anatomy = anatomy_of(model, "tiny")
    with pytest.raises(Cancelled):
        all_moments(model, anatomy, should_stop=lambda: True)
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert not any("forward" in vars(block) or block._forward_pre_hooks for block in model.model.layers)
    assert anatomy_of(model, "tiny") == anatomy


@pytest.mark.parametrize(
    ("requests", "ids", "said"),
    [({"nowhere": {"gram"}}, IDS, "nowhere"), ({"model.layers.0.mlp.up_proj": {"mode"}}, IDS, "mode"), ({}, IDS.repeat(1, 4), "too long")],
)
def test_bad_requests_are_refused(tiny_models, requests, ids, said):
    model = tiny_models("llama")
    with pytest.raises(InputError, match=said):
        walk(model, anatomy_of(model, "tiny"), ids, requests, lambda index, stats: None)


def test_a_model_whose_blocks_read_the_text_is_refused(tiny_models):
    """Replaying the first batch's arguments would give wrong figures without a word."""
    model = tiny_models("custom")

    class Peeking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, ids):
            return self.inner(x) + ids[..., None]

    model.stack = nn.ModuleList(Peeking(block) for block in model.stack)

    def forward(input_ids):
        x = model.tokens(input_ids)
        for block in model.stack:
            x = block(x, input_ids)
        return x

    model.forward = forward
    with pytest.raises(InputError, match="read the text"):
        walk(model, anatomy_of(model, "tiny"), IDS, {}, lambda index, stats: None, batch=2)
