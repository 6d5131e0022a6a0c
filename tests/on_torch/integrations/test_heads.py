"""The loss inside the head's own forward: plain, tied, compiled, and sharded by FSDP2."""

# T = tokens, V = vocabulary, H = hidden

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from helpers.process_group import over_processes
from loss_core import FusedLinearCEConfig
from loss_core_torch.integrations.heads import call_in_head

V, H, T = 97, 32, 24


class Model(nn.Module):
    def __init__(self, tied=False, bias=False):
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.norm = nn.LayerNorm(H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens, labels, loss):
        hidden = self.norm(self.embedding(tokens) + self.layer(self.embedding(tokens)).tanh())
        if loss is None:
            return F.cross_entropy(self.lm_head(hidden), labels)
        return call_in_head(self.lm_head, hidden, labels, loss)


def made(tied=False, bias=False):
    torch.manual_seed(0)
    return Model(tied, bias)


def batch(seed=0, number=T):
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(0, V, (2, number), generator=generator)
    labels[:3] = -100
    return tokens, labels


def mean_loss():
    return FusedLinearCEConfig(reduction="mean").build(backend="torch:eager")


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_are_those_of_the_logits(tied, bias):
    ours, own = made(tied, bias), made(tied, bias)
    loss, expected = ours(*batch(), mean_loss()), own(*batch(), None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    for parameter, other in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_the_hooks_of_the_head_surround_the_loss():
    model, seen = made(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append("after"))
    loss_fn = mean_loss()

    def loss(*args):
        seen.append("loss")
        return loss_fn(*args)

    model(*batch(), loss)
    assert seen == ["before", "loss", "after"]


def test_arguments_reach_the_loss():
    model, hidden, labels = made(), torch.randn(T, H), batch()[1]
    loss = FusedLinearCEConfig(reduction="sum").build()
    whole = call_in_head(model.lm_head, hidden, labels, loss)
    torch.testing.assert_close(call_in_head(model.lm_head, hidden, labels, loss, num_label_tokens=4), whole / 4)


def test_the_forward_is_restored_after_an_error():
    head, hidden = nn.Linear(H, V, bias=False), torch.randn(T, H)
    with pytest.raises(ValueError, match="labels has shape"):
        call_in_head(head, hidden, torch.zeros(T + 1, dtype=torch.long), mean_loss())
    assert head(hidden).shape == (T, V)
    assert "forward" not in vars(head)


def test_a_replaced_forward_is_restored():
    head, hidden = nn.Linear(H, V, bias=False), torch.randn(T, H)

    def own(x):
        return F.linear(x, head.weight) * 2

    head.forward = own
    call_in_head(head, hidden, batch()[1], mean_loss())
    assert head.forward is own


@pytest.mark.parametrize(
    ("head", "error", "says"),
    [
        (nn.Embedding(V, H), TypeError, "torch.nn.modules.sparse.Embedding.*forward is not that of torch.nn.Linear"),
        (torch.zeros(V, H), TypeError, "pass the module that holds it"),
        ("lm_head", TypeError, "builtins.str; pass the torch.nn.Linear"),
    ],
)
def test_heads_that_are_refused(head, error, says):
    with pytest.raises(error, match=says):
        call_in_head(head, torch.randn(T, H), batch()[1], mean_loss())


@pytest.mark.slow
def test_compiled():
    ours, own = made(), made()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    loss, expected = compiled(*batch(), mean_loss()), own(*batch(), None)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, own.lm_head.weight.grad, rtol=1e-5, atol=1e-6)
    assert ours.lm_head(torch.randn(T, H)).shape == (T, V)


LAYOUTS = ["head apart", "in the root", "norm and head", "tied", "bfloat16", "bias"]


def sharded(model, layout):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    settings = {"mesh": mesh}
    if layout == "bfloat16":
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.layer, **settings)
    if layout in ("head apart", "bfloat16", "bias"):
        fully_shard(model.lm_head, **settings)
    if layout == "norm and head":
        fully_shard([model.norm, model.lm_head], **settings)
    return fully_shard(model, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@over_processes(2)
def test_fsdp2(world, layout):
    ours, own = (made(tied=layout == "tied", bias=layout == "bias") for _ in range(2))
    ours = sharded(ours, layout)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (ours, own)]
    exact = layout != "bfloat16"
    for step in range(3):
        seeds = [2 * step + rank for rank in range(world.ranks)]
        losses = [own(*batch(seed), None) for seed in seeds]
        loss = ours(*batch(seeds[world.rank]), mean_loss())
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(loss.float(), losses[world.rank], **tolerance)
        loss.backward()
        # FSDP takes the mean over the ranks.
        (sum(losses) / world.ranks).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for parameter, other in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), other, **tolerance)
