"""Muon beside a plain loop, what it leaves alone, steps that are left out, and states that go on bitwise."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny import tiny_network
from torch import Tensor, nn

from training.optimizers import MATRIX_RATE, Muon, hidden_matrices, make_optimizer, orthogonalize, set_learning_rate


def gradients(model: nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=rng)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Conv2d(16, 8, 3), nn.Conv2d(16, 8, 3), nn.Linear(24, 5))


def muon(model: nn.Module, lr: float = 1e-2) -> Muon:
    optimizer = make_optimizer("muon", model, lr, img_channels=3)
    assert isinstance(optimizer, Muon)
    return optimizer


# --- Orthogonal moves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 20), (8, 60), (60, 8), (1, 5)])
def test_singular_values_become_about_equal_and_vectors_stay(shape):
    rng = torch.Generator().manual_seed(1)
    given = torch.randn([3, *shape], generator=rng, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = orthogonalize(given)
    u, s, vh = torch.linalg.svd(given, full_matrices=False)
    # The iteration lifts what is above a few thousandths of the norm.
    large = s > 0.01 * torch.linalg.matrix_norm(given)[:, None]
    new = torch.diagonal(u.mT @ found @ vh.mT, dim1=1, dim2=2)
    assert ((new > 0.65) & (new < 1.25))[large].all() and large.float().mean() > 0.9
    assert torch.dist(found, u @ torch.diag_embed(new) @ vh) < 1e-9 * found.norm()


def test_every_matrix_of_a_batch_is_moved_by_itself():
    rng = torch.Generator().manual_seed(2)
    given = torch.randn([4, 9, 12], generator=rng, dtype=torch.float64)
    assert torch.allclose(orthogonalize(given)[2], orthogonalize(given[2:3])[0], rtol=1e-12, atol=1e-12)
    assert torch.allclose(orthogonalize(given.mT), orthogonalize(given).mT)
    assert not orthogonalize(torch.zeros(1, 4, 6)).any()


# --- A step ----------------------------------------------------------------------------------------------------------


def plain_muon(weight: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """The formulas of the module's docstring, one matrix at a time in float64, with a plain Newton-Schulz iteration."""
    shape, w = weight.shape, weight.double().flatten(1)
    momentum = torch.zeros_like(w)
    for grad in grads:
        g = grad.double().flatten(1)
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.95 * momentum + 0.05 * g
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        w = w - lr * 0.2 * max(w.shape) ** 0.5 * x
    return w.reshape(shape)


def test_steps_equal_a_plain_loop_and_torch_adam():
    model = small_model()
    twin = copy.deepcopy(model)
    matrices = list(hidden_matrices(model, 3))
    ids = {id(p) for p in matrices}
    optimizer, start = muon(model), values(model)
    reference = torch.optim.Adam(
        [p for p, q in zip(twin.parameters(), model.parameters()) if id(q) not in ids], lr=1e-2
    )
    history: list[list[Tensor]] = []
    for seed in range(4):
        gradients(model, seed)
        gradients(twin, seed)
        history.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        reference.step()
    assert [tuple(p.shape) for p in matrices] == [(16, 6), (8, 16, 3, 3), (8, 16, 3, 3), (5, 24)]
    for i, (param, other) in enumerate(zip(model.parameters(), twin.parameters())):
        if id(param) in ids:
            expected = plain_muon(start[i], [grads[i] for grads in history], 1e-2 * MATRIX_RATE)
            assert torch.allclose(param.double(), expected, rtol=0, atol=2e-6)
        else:
            assert torch.allclose(param, other, rtol=1e-6, atol=1e-7)


def test_moves_have_the_size_of_those_of_adam():
    weight = nn.Parameter(torch.zeros(40, 90))
    optimizer = Muon([weight], [weight], lr=0.5)
    weight.grad = torch.randn(40, 90, generator=torch.Generator().manual_seed(0)) * 1e-4
    optimizer.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.5 * MATRIX_RATE, rel=0.25)


def test_which_weights_are_matrices():
    net = tiny_network(label_dim=5, use_step_condition=True)
    chosen = {id(p) for p in hidden_matrices(net, 3, 5)}
    left = {name for name, p in net.named_parameters() if id(p) not in chosen and p.ndim > 1}
    assert left == {"model.enc.8x8_conv.weight", "model.dec.8x8_aux_conv.weight", "model.map_label.weight"}
    assert all(p.ndim > 1 for p in net.parameters() if id(p) in chosen)
    assert not list(hidden_matrices(nn.Embedding(30, 40), 3))
    net.requires_grad_(False)
    assert not list(hidden_matrices(net, 3, 5))


def test_parameters_without_gradients_stay_and_have_no_state():
    model = small_model()
    optimizer, before = muon(model), values(model)
    gradients(model, 0)
    for param in model[2].parameters():
        param.grad = None
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, values(model))]
    assert changed == [True] * 4 + [False] * 2 + [True] * 4
    assert not optimizer.state[model[2].weight]


def test_rates_follow_one_number():
    optimizer = muon(small_model(), lr=1e-2)
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2 * MATRIX_RATE, 1e-2]
    set_learning_rate(optimizer, 3e-3)
    assert [g["lr"] for g in optimizer.param_groups] == [3e-3 * MATRIX_RATE, 3e-3]
    adam = make_optimizer("adam", small_model(), 1.0, 3)
    set_learning_rate(adam, 0.5)
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["lr"] == 0.5


# --- Steps left out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False], ids=["at-the-start", "later"])
def test_found_inf_leaves_everything_as_it_was(first):
    model, other = small_model(), small_model()
    optimizers = muon(model), muon(other)
    if not first:
        for net, optimizer in zip((model, other), optimizers):
            gradients(net, 1)
            optimizer.step()
    before = values(model)
    gradients(model, 2)
    for param in model.parameters():
        param.grad[0] = float("nan")  # what an overflow leaves behind
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    assert equal(before, values(model))
    optimizers[0].found_inf = torch.zeros(())
    for net, optimizer in zip((model, other), optimizers):
        gradients(net, 3)
        optimizer.step()
    assert equal(values(model), values(other))


# --- States ----------------------------------------------------------------------------------------------------------


def test_a_state_that_was_saved_goes_on_bitwise():
    model = small_model()
    optimizer = muon(model)
    for seed in range(3):
        gradients(model, seed)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin = copy.deepcopy(model)
    resumed = muon(twin)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for net, own in ((model, optimizer), (twin, resumed)):
        set_learning_rate(own, 2e-3)
        gradients(net, 9)
        own.step()
    assert equal(values(model), values(twin))


def test_order_of_equal_shapes_does_not_matter():
    """Batches over shapes: a weight moves in the same way whatever else has its shape."""
    model = small_model()
    alone = copy.deepcopy(model[2])
    gradients(model, 0)
    for param, grad in zip(alone.parameters(), model[2].parameters()):
        param.grad = grad.grad.clone()
    muon(model).step()
    muon(alone).step()
    assert torch.allclose(alone.weight, model[2].weight, rtol=0, atol=1e-7)
