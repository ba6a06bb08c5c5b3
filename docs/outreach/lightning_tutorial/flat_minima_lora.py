# %% [markdown]
# LoRA trains two small factors, A and B, in place of a weight: the layer computes with `W0 + s B A`. Sharpness-aware
# minimization (SAM) asks for weights around which the loss stays low. EFMLoRA does so for LoRA at LoRA's speed: each
# gradient is taken at `B + E`, where E is a moving average of past worst-case perturbations of the full weight. With
# Lightning it is one callback.
#
# This notebook adapts a small network to rotated digits, from few examples, at several learning rates.

# %%
import lightning as L
import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_flatlora import EFMLoRA, Perturbation, find_pairs
from lightning_flatlora.flatness import sam_sharpness

# %% [markdown]
# ## A pretrained network
#
# Scikit-learn brings 1,797 digits of 8 x 8 pixels. The network learns them upright. Then they are turned by 90 degrees,
# and 8 examples of each digit are kept to adapt it.

# %%
L.seed_everything(0)
digits = load_digits()
upright = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
pretraining, rest = order[:900], order[900:]

network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
for _ in range(300):
    optimizer.zero_grad()
    F.cross_entropy(network(upright[pretraining]), labels[pretraining]).backward()
    optimizer.step()
pretrained = network.state_dict()

turned = upright.rot90(1, (1, 2))
few = torch.cat([rest[labels[rest] == digit][:8] for digit in range(10)])
held_out = rest[~torch.isin(rest, few)]
train_set = TensorDataset(turned[few], labels[few])


# %% [markdown]
# ## The module
#
# Nothing in it knows about the method.


# %%
class Digits(L.LightningModule):
    def __init__(self, learning_rate, dropout=0.0):
        super().__init__()
        self.learning_rate = learning_rate
        network.load_state_dict(pretrained)
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["1", "3", "5"])
        self.net = get_peft_model(network, lora)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return F.cross_entropy(self.net(images), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


# %% [markdown]
# ## Three ways to train
#
# Plain LoRA, LoRA with dropout, and EFMLoRA, whose `rho` is the radius of the perturbation in the units of the weights.
# With `rho=0` it is plain LoRA, bit for bit. The sharpness is the rise of the loss on held-out
# digits, in nats, from the weights to the worst-case perturbation of radius 1.

# %%
METHODS = {"LoRA": (0.0, []), "EFMLoRA": (0.0, [EFMLoRA(rho=0.3)]), "LoRA, dropout 0.5": (0.5, [])}
RATES = (1e-3, 4e-3, 8e-3)
EPOCHS = 40


def train(dropout, callbacks, rate):
    """Return the loss on held-out digits, and the sharpness of that loss."""
    L.seed_everything(1)
    module = Digits(rate, dropout)
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train_set, batch_size=16, shuffle=True))
    module.eval()

    def held_out_loss():
        return F.cross_entropy(module.net(turned[held_out]), labels[held_out])

    found = sam_sharpness(held_out_loss, Perturbation(find_pairs(module).pairs), rho=1.0)
    module.net.unload()  # the next run begins with the pretrained network
    return found.loss.item(), found.sharpness.item()


results = {}
for name, (dropout, callbacks) in METHODS.items():
    for rate in RATES:
        results[name, rate] = train(dropout, callbacks, rate)
        loss, sharpness = results[name, rate]
        print(f"{name:18} rate {rate:g}: held-out loss {loss:.3f}, sharpness {sharpness:.4f}")

# %%
for name in METHODS:
    plt.plot(RATES, [results[name, rate][0] for rate in RATES], marker="o", label=name)
plt.xscale("log")
plt.xlabel("learning rate")
plt.ylabel("held-out loss (nats)")
plt.legend()
plt.show()

# %% [markdown]
# ## What to take from it
#
# EFMLoRA changes which minimum is found, at the price of a callback. Whether that helps depends on the task: dropout,
# a lower rank and a lower learning rate often do as much. Search them first, on validation data, with `rho=0` among the
# values. `AdapterCheckpoint()` saves checkpoints of the adapter's size, and `FlatnessMonitor(rho=1.0)` logs the
# sharpness while a model trains.
