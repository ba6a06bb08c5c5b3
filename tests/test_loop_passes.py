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
