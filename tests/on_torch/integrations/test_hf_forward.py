"""The fused loss in a model's forward: heads, scales, softcaps, adapters, and what is refused."""

import copy
import inspect

import pytest
import torch

from helpers.largest_tensor import LargestTensor
from helpers.process_group import over_processes
from helpers.tiny_models import MINICPM3, H, V, batch, made, with_biased_head
from loss_core import FusedLinearCEConfig, KDLossConfig
from loss_core_torch.integrations.hf import use_fused_loss

pytest.importorskip("transformers")

MODELS = {
    "untied": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "bias": ("Phi", {}),
    "logit_scale": ("Cohere", {"logit_scale": 0.25}),
    "logits_scaling divides": ("Granite", {"logits_scaling": 4.0}),
    "logits_scaling before the head": ("MiniCPM3", MINICPM3),
    "logits_scaling multiplies": ("HyperCLOVAX", {"logits_scaling": 0.25}),
    "final_logit_softcapping": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 16}),
    "auxiliary loss": ("Mixtral", {"output_router_logits": True, "num_local_experts": 4, "router_aux_loss_coef": 0.5}),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model(name):
    kind, settings = MODELS[name]
    assert_same(made(kind, **settings), made(kind, **settings))


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping"])
def test_a_bias_is_scaled_and_capped_with_its_logits(name):
    kind, settings = MODELS[name]
    assert_same(*(with_biased_head(kind, tie_word_embeddings=False, **settings) for _ in range(2)))


def assert_same(ours, own):
    use_fused_loss(ours, FusedLinearCEConfig())
    for arguments in ({}, {"num_items_in_batch": torch.tensor(50)}):
        outputs, expected = ours(**batch(), **arguments), own(**batch(), **arguments)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-5)
        outputs.loss.backward()
        expected.loss.backward()
    for (key, parameter), other in zip(ours.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_no_tensor_of_the_size_of_the_logits():
    # Logits of 128 MiB: more than a block of the kernel's.
    tokens = {name: x.repeat(32, 1) for name, x in batch(size=4).items()}
    model = made(vocab_size=2 * 2**14)
    use_fused_loss(model, backend="torch:eager")
    with LargestTensor() as largest:
        model(**tokens).loss.backward()
    assert 0 < largest.numel < tokens["labels"].numel() * 2**14


def test_evaluation_returns_logits_and_the_same_loss():
    ours, own = made().eval(), made().eval()
    use_fused_loss(ours)
    outputs, expected = ours(**batch()), own(**batch())
    torch.testing.assert_close(outputs.logits, expected.logits)
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_evaluation_has_the_losses_options():
    from torch.nn.functional import cross_entropy

    model = made()
    use_fused_loss(model, FusedLinearCEConfig(label_smoothing=0.25))
    trained = model.train()(**batch()).loss
    outputs = model.eval()(**batch())
    labels = batch()["labels"][:, 1:].reshape(-1)
    expected = cross_entropy(outputs.logits[:, :-1].reshape(-1, V), labels, label_smoothing=0.25)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)


def test_without_labels_the_forward_is_the_models_own():
    model = made()
    use_fused_loss(model)
    assert model(input_ids=batch()["input_ids"]).logits.shape[-1] == V
    assert model.eval().generate(batch()["input_ids"], max_new_tokens=2, do_sample=False).shape[1] == 14


def test_labels_by_position_and_a_tuple_of_outputs():
    ours, own = made(), made()
    use_fused_loss(ours)
    names = list(inspect.signature(own.forward).parameters)
    args = [batch().get(name) for name in names[: names.index("labels") + 1]]
    loss, expected = ours(*args, use_cache=False, return_dict=False), own(*args)[0]
    assert isinstance(loss, tuple)
    assert len(loss) == 1
    torch.testing.assert_close(loss[0], expected, rtol=1e-5, atol=1e-5)


def test_shift_labels_are_used_unchanged():
    ours, own = made(), made()
    use_fused_loss(ours)
    # Other tokens than the labels, so that using these instead would show.
    shifted = batch(seed=1)["input_ids"]
    losses = [model(**batch(), shift_labels=shifted).loss for model in (ours, own)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def test_labels_that_are_shifted_already_give_another_number():
    model = made()
    use_fused_loss(model)
    shifted = batch() | {"labels": torch.nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]}
    assert abs(model(**batch()).loss - model(**shifted).loss) > 0.01


def test_undo():
    model = made()
    signature = inspect.signature(model.forward)
    undo = use_fused_loss(model)
    assert inspect.signature(model.forward) == signature
    with pytest.raises(ValueError, match="LlamaForCausalLM has a fused loss already"):
        use_fused_loss(model)
    undo()
    assert "forward" not in vars(model)
    assert model(**batch()).logits.shape[-1] == V
    with pytest.raises(RuntimeError, match="forward is not this one any more"):
        undo()
    use_fused_loss(model)


def test_the_head_is_restored_after_an_error():
    model = made()
    use_fused_loss(model)
    with pytest.raises(ValueError, match="labels has shape"):
        model(**batch() | {"labels": torch.zeros(4, 3, dtype=torch.long)})
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert "_loss_function" not in vars(model)


def test_a_deep_copy_has_its_own_weights():
    model = made()
    use_fused_loss(model)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.mul_(2.0)
    loss = twin(**batch()).loss
    loss.backward()
    assert model.lm_head.weight.grad is None
    assert abs(loss - model(**batch()).loss) > 0.01


def test_bfloat16():
    ours, own = made().bfloat16(), made().bfloat16()
    use_fused_loss(ours)
    torch.testing.assert_close(ours(**batch()).loss, own(**batch()).loss.float(), rtol=1e-2, atol=1e-2)


def with_peft(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **settings))


@pytest.mark.parametrize("first", ["peft", "loss"])
def test_a_head_in_modules_to_save(first):
    def trained(fused):
        model = made()
        if fused and first == "loss":
            use_fused_loss(model)
        model = with_peft(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
        # As after some training: the copy differs from the original.
        model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(0.5)
        if fused and first == "peft":
            use_fused_loss(model)
        loss = model(**batch()).loss
        loss.backward()
        return loss, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    (loss, gradients), (expected, others) = trained(True), trained(False)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert "base_model.model.lm_head.modules_to_save.default.weight" in gradients
    torch.testing.assert_close(gradients, others, rtol=1e-4, atol=1e-5)


def test_lora_on_the_head_is_refused():
    model = with_peft(made(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.lm_head is peft\..*LoRA adapter.*modules_to_save"):
        use_fused_loss(model)


def test_lora_that_comes_later_is_refused_at_the_forward():
    model = made()
    use_fused_loss(model)
    model = with_peft(model, target_modules=["lm_head"])
    with pytest.raises(TypeError, match="LoRA adapter"):
        model(**batch())


class Quantised(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.round())


def replaced(head):
    model = made()
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        (lambda: replaced(Quantised(H, V, bias=False)), TypeError, "Quantised, whose forward is not .*quantised"),
        (lambda: made().model, TypeError, "LlamaModel has no head"),
        (lambda: torch.nn.Linear(H, V), TypeError, "pass a transformers model"),
        (lambda: torch.nn.DataParallel(made()), TypeError, "wrapped by torch.nn.*DataParallel; pass .* model.module"),
        (lambda: torch.compile(made()), TypeError, "wrapped by .*OptimizedModule; pass .* model._orig_mod"),
    ],
)
def test_models_that_are_refused(model, error, says):
    with pytest.raises(error, match=says):
        use_fused_loss(model())


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (KDLossConfig(), TypeError, "takes a FusedLinearCEConfig, got a KDLossConfig"),
        (FusedLinearCEConfig(reduction="none"), ValueError, "reduction='none'"),
        (FusedLinearCEConfig(ignore_index=0), ValueError, "ignore_index=0"),
        (FusedLinearCEConfig(logit_softcapping=3.0), ValueError, "3.0 in config, 0.0 in LlamaForCausalLM"),
        (FusedLinearCEConfig(tp_group=object()), ValueError, "tp_group"),
    ],
)
def test_configs_that_are_refused(config, error, says):
    with pytest.raises(error, match=says):
        use_fused_loss(made(), config)


def test_logits_that_are_made_in_an_unknown_way_are_refused():
    model = made("Granite", logits_scaling=4.0)
    use_fused_loss(model)
    model.config.logits_scaling = 8.0
    with pytest.raises(RuntimeError, match=r"GraniteForCausalLM.forward turns the logits \[1.0, 100.0\] into"):
        model(**batch())


def with_forward(function):
    """A model with a custom forward, from hidden states to a loss."""
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutput

    class Own(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, return_dict=None):
            loss, logits = function(self, self.model(input_ids).last_hidden_state, labels)
            return CausalLMOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    return Own(made().config).train()


def loss_without_loss_function(model, hidden, labels):
    logits = model.lm_head(hidden)
    return logits.sum(), logits


def logits_without_head(model, hidden, labels):
    logits = hidden @ model.lm_head.weight.T
    return model.loss_function(logits=logits, labels=labels, vocab_size=V), logits


def head_called_twice(model, hidden, labels):
    logits = model.lm_head(hidden) + model.lm_head(hidden)
    return model.loss_function(logits=logits, labels=labels, vocab_size=V), logits


def fewer_classes(model, hidden, labels):
    logits = model.lm_head(hidden)
    return model.loss_function(logits=logits, labels=labels, vocab_size=V - 1), logits


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (loss_without_loss_function, RuntimeError, "called self.loss_function 0 times.*causal_lm_loss"),
        (logits_without_head, RuntimeError, "makes its logits without calling its head"),
        (head_called_twice, RuntimeError, "calls its head more than once"),
        (fewer_classes, ValueError, "head of Own has 97 rows for vocab_size=96"),
    ],
)
def test_forwards_that_are_refused(function, error, says):
    model = with_forward(function)
    use_fused_loss(model)
    with pytest.raises(error, match=says):
        model(**batch())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@over_processes(2)
def test_fsdp2(world, tied):
    from torch.distributed.fsdp import fully_shard

    ours, own = made(tie_word_embeddings=tied), made(tie_word_embeddings=tied)
    use_fused_loss(ours)
    for layer in ours.model.layers:
        fully_shard(layer)
    if not tied:
        fully_shard(ours.lm_head)
    fully_shard(ours)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (ours, own)]
    for step in range(3):
        batches = [batch(seed=world.ranks * step + rank, ignored=3 + rank) for rank in range(world.ranks)]
        count = sum((x["labels"][:, 1:] != -100).sum() for x in batches)
        # FSDP takes the mean over the ranks.
        loss = ours(**batches[world.rank], num_items_in_batch=count).loss * world.ranks
        loss.backward()
        large = {name: torch.cat([x[name] for x in batches]) for name in batches[0]}
        expected = own(**large, num_items_in_batch=count).loss
        expected.backward()
        torch.distributed.all_reduce(loss := loss.detach())
        torch.testing.assert_close(loss / world.ranks, expected.detach(), rtol=1e-5, atol=1e-5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for parameter, other in zip(ours.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), other, rtol=1e-5, atol=1e-5)
