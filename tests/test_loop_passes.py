"""What belongs to a pass of a loop: what runs without gradients in it, and how a gradient has come about."""

import copy
from typing import Any

import pytest
import torch
from helpers import same, weights
from hostile_modules import CHECKPOINTS, Checkpointed
from loop_runs import METHODS, batches, run, started
from torch import Tensor, nn

from lightning_flatlora.pairs.lora_pair import trained_factors


@pytest.mark.parametrize("how", ["reentrant", "another library's"])
def test_a_reentrant_checkpoint_reads_as_the_layers_in_it(how: str) -> None:
    """Its forward pass runs without gradients, and yet belongs to the training pass."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    x, y = batches()[2]
    expected = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), trained_factors(flat.method.pairs))
    optimizer.zero_grad()
    nn.functional.cross_entropy(Checkpointed(net, CHECKPOINTS[how])(x), y).backward()
    assert same([p.grad for p in trained_factors(flat.method.pairs)], list(expected))


class WithoutContext(torch.autograd.Function):
    """Computes its forward again in the backward pass, in PyTorch's newer style."""

    @staticmethod
    def forward(net: Any, x: Tensor) -> Any:
        return net(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.net, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.net(x), gradient)
        return None, x.grad


class OfAnyArguments(torch.autograd.Function):
    """The same, with a forward that names none of its arguments."""

    @staticmethod
    def forward(*args: Any) -> Any:
        self, self.net, x = args
        self.save_for_backward(x)
        return self.net(x)

    backward = WithoutContext.backward


class WithinNoGrad(nn.Module):
    """A block that also looks at its own output without gradients."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.net(x).norm()
        return self.net(x) / size


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's compiler on a checkpoint's input
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("kind", ["compiled", "without context", "any arguments"])
def test_other_checkpoints_read_as_the_layers_in_them(kind: str, passes: bool) -> None:
    how: Any = {"without context": WithoutContext.apply, "any arguments": OfAnyArguments.apply}.get(kind)
    found = []
    for checkpointed in (False, True):
        flat, net, optimizer = started("EFMLoRA")
        run(flat, net, optimizer, batches()[:2])
        block: Any = net
        if kind == "compiled":
            block = torch.compile(net, backend="eager")
        model = Checkpointed(block, how or CHECKPOINTS["reentrant"]) if checkpointed else block
        run(flat, model, optimizer, batches()[2:5]) if passes else plain_steps(model, optimizer)
        found.append(weights(net))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def plain_steps(model: nn.Module, optimizer: Any) -> None:
    for x, y in batches()[2:5]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_a_checkpoint_repeats_what_ran_without_gradients_in_it() -> None:
    """Whatever that reads, the forward pass and its repetition read the same values."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    x, y = batches()[2]
    model = Checkpointed(WithinNoGrad(net), CHECKPOINTS["reentrant"])
    sizes: list[Tensor] = []
    model.net.net.register_forward_hook(lambda module, args, output: sizes.append(output.detach().norm()))
    nn.functional.cross_entropy(model(x), y).backward()
    found, expected = sizes[:2], sizes[2:]
    assert len(expected) == 2
    assert same(found, expected)


def test_gradients_of_the_inputs_in_eval_mode_are_those_of_the_clean_weights() -> None:
    """Saliency maps, between steps and within an accumulation window, also through a checkpoint."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    clean, (x, y) = copy.deepcopy(net), batches()[2]
    model = Checkpointed(net, CHECKPOINTS["not reentrant"])
    for within_window in (False, True):
        if within_window:
            nn.functional.cross_entropy(net(x), y).backward()
        net.eval()
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        model(inputs[0]).square().mean().backward()
        clean.eval()(inputs[1]).square().mean().backward()
        assert same(inputs[0].grad, inputs[1].grad)
        net.train()
        optimizer.zero_grad()


class Cached(nn.Module):
    """Embeds without gradients, takes the loss's gradient to the embeddings, and embeds again in the backward pass.

    As GradCache and the cached losses of sentence-transformers do, to hold one part's graph at a time.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            embedded = self.net(x).requires_grad_()
        with torch.enable_grad():
            value = nn.functional.cross_entropy(embedded, y)
            (gradient,) = torch.autograd.grad(value, embedded)
        value = value.detach().requires_grad_()
        value.register_hook(lambda factor: self.embed_again(x, gradient * factor))
        return value

    def embed_again(self, x: Tensor, gradient: Tensor) -> None:
        with torch.enable_grad():
            self.net(x).backward(gradient)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_that_caches_gradients_is_refused_outside_of_its_passes(name: str) -> None:
    """It would mix the clean weights of its first embeddings with the perturbed ones of its second."""
    flat, net, optimizer = started(name)
    run(flat, net, optimizer, batches()[:2])
    x, y = batches()[2]

    def gradients(loss: Any, **arguments: Any) -> list[Any]:
        optimizer.zero_grad()
        for each_pass in flat.training_passes(**arguments):
            with each_pass:
                loss(x, y).backward()
        return [p.grad for p in trained_factors(flat.method.pairs)]

    with pytest.raises(RuntimeError, match=r"had read clean. .* under no_grad .* GradCache .*also_no_grad=True"):
        gradients(Cached(net))
    expected = gradients(lambda x, y: nn.functional.cross_entropy(net(x), y))
    torch.testing.assert_close(gradients(Cached(net), also_no_grad=True), expected)
    optimizer.step()


@pytest.mark.parametrize("how", ["not reentrant", "reentrant"])
def test_an_evaluation_between_forward_and_backward_changes_nothing(how: str) -> None:
    """It leaves the layers in eval mode, in which a checkpoint calls them again."""
    taken = []
    for mode in (True, False):
        flat, net, optimizer = started("EFMLoRA")
        run(flat, net, optimizer, batches()[:2])
        x, y = batches()[2]
        value = nn.functional.cross_entropy(Checkpointed(net, CHECKPOINTS[how])(x), y)
        net.train(mode)
        value.backward()
        optimizer.step()
        taken.append(weights(net))
    assert same(taken[0], taken[1])


@pytest.mark.parametrize("how", ["train", "eval", "forward"])
def test_gradients_by_autograd_grad_are_those_of_backward_or_refused(how: str) -> None:
    """They come by no hook, as in PCGrad, GradNorm and other weightings of tasks."""
    trained = []
    for by_hand in (False, True):
        flat, net, optimizer = started("EFMLoRA")
        run(flat, net, optimizer, batches()[:2])
        parameters, (x, y) = [p for p in net.parameters() if p.requires_grad], batches()[2]
        net.train(how != "eval")
        layers: Any = net.base_model.model.forward if how != "forward" else through(net.base_model.model)
        value = nn.functional.cross_entropy(layers(x), y)
        if by_hand:
            for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
                parameter.grad = gradient
        else:
            value.backward()
        if how == "train":
            optimizer.step()
            trained.append(weights(net))
            continue
        with pytest.raises(RuntimeError, match=r"factors, such as .*lora_B.* were taken without Ê"):
            optimizer.step()
    assert how != "train" or same(trained[0], trained[1])


def through(layers: nn.Sequential) -> Any:
    """The network of these layers, without calling them."""

    def forward(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer.forward(x)
        return x

    return forward


@pytest.mark.parametrize("name", METHODS)
def test_replaced_parts_of_a_layer_are_refused_until_the_next_look(name: str) -> None:
    """As by quantization-aware training and float8, whose new modules hold the very parameters."""
    flat, net, optimizer = started(name)
    run(flat, net, optimizer, batches()[:2])
    for pair in flat.method.pairs:
        (layer,) = pair.layers
        new = nn.Linear(*pair.B.T.shape, bias=False)
        new._parameters["weight"] = pair.B
        layer.lora_B["default"] = new
    with pytest.raises(RuntimeError, match=r"taken without Ê\. .* parts of the layers were replaced, call look_again"):
        run(flat, net, optimizer, batches()[2:3])
    flat.look_again()
    optimizer.zero_grad()
    run(flat, net, optimizer, batches()[2:3])


@pytest.mark.parametrize("leave", ["close", "look_again"])
def test_another_librarys_class_on_top_stays(leave: str) -> None:
    """parametrize and fully_shard put one on a layer's part; without it the part would have no weight."""
    flat, net, optimizer = started("EFMLoRA")
    run(flat, net, optimizer, batches()[:2])
    x, _ = batches()[2]
    part = net.get_submodule("base_model.model.2.lora_B.default")
    torch.nn.utils.parametrizations.weight_norm(part)
    expected = copy.deepcopy(net).eval()(x)
    getattr(flat, leave)()
    assert same(net.eval()(x), expected)


@pytest.mark.parametrize("name", METHODS)
def test_what_runs_without_gradients_in_a_pass_reads_the_clean_weights(name: str) -> None:
    """A teacher's targets, or a policy's own earlier probabilities."""
    flat, net, optimizer = started(name)
    run(flat, net, optimizer, batches()[:2])
    clean, (x, y) = copy.deepcopy(net), batches()[2]
    read = []
    for each_pass in flat.training_passes():
        with each_pass:
            with torch.no_grad():
                assert same(net(x), clean(x))
            output = net(x)
            read.append(output.detach())
            nn.functional.cross_entropy(output, y).backward()
    assert not same(read[-1], clean(x))
