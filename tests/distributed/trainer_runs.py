"""transformers' Trainer and trl's trainers on CPU processes: under DDP, FSDP2, and DeepSpeed's ZeRO."""

import os
from pathlib import Path
from typing import Any

import datasets
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from deepspeed_runs import start, weights
from hf_runs import arguments, callback_of, processing_of_words
from peft import LoraConfig, get_peft_model
from tensor_runs import LOADED, loaded, same_start
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lightning_flatlora.transformers import TwoPassTrainer

STEPS, SAVED, SIZE = 6, 3, 4
TARGETS = ["v_proj", "o_proj", "down_proj"]
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def settings_of(how: str) -> dict[str, Any]:
    """A Trainer's arguments for "alone", "ddp", "fsdp2", "zero" with a stage, or a way of ``from_pretrained``."""
    if how == "ddp":
        return {"ddp_backend": "gloo"}
    if how == "fsdp2":
        wrapped = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "version": 2}
        return {"fsdp": True, "fsdp_config": wrapped, "ddp_backend": "gloo"}
    if how.startswith("zero"):
        zero = {"stage": int(how[-1]), "stage3_param_persistence_threshold": 0}
        return {"deepspeed": {**CONFIG, "zero_optimization": zero}, "use_cpu": False}
    # transformers itself saves no such optimizer.
    return {"save_only_model": True} if how in LOADED else {}


class OnCPU:
    """Lets accelerate shard by FSDP2 on CPU processes, where it would choose DDP."""

    def create_accelerator_and_postprocess(self: Any) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self.args.fsdp:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
            PartialState._shared_state.update(distributed_type=DistributedType.FSDP)
            self.is_fsdp_enabled = True


KINDS: dict[str, Any] = {
    "Trainer": (Trainer, TrainingArguments),
    "SFT": (SFTTrainer, SFTConfig),
    "DPO": (DPOTrainer, DPOConfig),
}


def rows_of(kind: str) -> Any:
    rows: list[dict[str, Any]] = []
    for i in range(SIZE * STEPS * 2):
        prompt, chosen, rejected = f"w{i % 30} w{i % 7}", f" w{i % 11} w{i % 5}", f" w{i % 13} w{i % 3}"
        row = {"SFT": {"text": prompt + chosen}, "DPO": {"prompt": prompt, "chosen": chosen, "rejected": rejected}}
        rows.append(row.get(kind, {"input_ids": [i % 30, i % 7, i % 11], "labels": [i % 30, i % 7, i % 11]}))
    return datasets.Dataset.from_list(rows)


def trainer_of(how: str, kind: str, folder: str, name: str | None, rho: float, **settings: Any) -> Any:
    """A Trainer on this process's share of each batch."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if how.startswith("zero"):
        start()
        PartialState._prepare_backend = lambda *args: ("gloo", DistributedType.MULTI_CPU)
    ranks = int(os.environ["WORLD_SIZE"]) if how not in ("alone", "tensor") else 1
    targets = settings.pop("targets", TARGETS)
    settings = {"max_steps": STEPS, "save_steps": SAVED, "max_grad_norm": 0.0, **settings_of(how), **settings}
    settings |= {"per_device_train_batch_size": SIZE // ranks, "train_sampling_strategy": "sequential"}
    base, config = KINDS[kind]
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = loaded(how, folder)
    own: dict[str, Any] = {"processing_class": processing_of_words(), "peft_config": lora}
    if kind == "Trainer":
        model, own = get_peft_model(model, lora), {}
    bases = (OnCPU, base) if name != "FMLoRA" else (OnCPU, base, TwoPassTrainer)
    trainer = type(f"OnCPU{kind}", bases, {})(
        model,
        args=arguments(Path(folder), config, **settings),
        train_dataset=rows_of(kind),
        callbacks=[callback_of(name, rho)] if name else [],
        **own,
    )
    same_start(trainer.model)
    return trainer


def by_trainer(
    how: str,
    kind: str,
    folder: str,
    name: str | None = "EFMLoRA",
    rho: float = 0.3,
    resumes: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train, and once more from a checkpoint in the middle."""
    found: dict[str, Any] = {}
    for again in (False, True)[: 1 + resumes]:
        trainer = trainer_of(how, kind, folder, name, rho, **settings)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{SAVED}" if again else None)
        found["resumed" if again else "weights"] = weights(trainer.model)
    return {**found, "wrapped": type(trainer.model_wrapped).__name__, "type": str(trainer.accelerator.distributed_type)}
