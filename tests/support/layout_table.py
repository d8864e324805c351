"""The layouts in which every model's function is tried, and those of experts and variants.

``docs/layouts.md`` has the same tables, and ``tests/adapters/test_translation.py`` tests every line.
"""

from __future__ import annotations

from support.layouts import (
    Layout,
    adding,
    changed,
    checkpoint,
    coarse,
    in_file,
    kohya,
    megatron,
    mlx,
    nothing,
    parts,
    renamed,
    rooted,
)

LAYOUTS = (
    Layout("the checkpoint's modules", "PEFT", checkpoint),
    Layout("names of the text model alone", "PEFT on `AutoModelForCausalLM`", rooted("model.")),
    Layout("names of the bare text model", "PEFT on `AutoModel`", rooted("")),
    Layout("`model.language_model.` before `layers`", "PEFT", rooted("model.language_model.")),
    Layout("`language_model.model.`", "transformers 4", rooted("language_model.model.")),
    Layout("`model.model.`", "PEFT on a wrapped model", rooted("model.model.")),
    Layout("`transformer.`", "diffusers", renamed("^base_model.model.", "transformer.")),
    Layout("no `base_model.model.`", "own scripts", renamed("^base_model.model.", "")),
    Layout("`_orig_mod.`", "`torch.compile`", renamed("^", "_orig_mod.")),
    Layout("`module.`", "DDP", renamed("^", "module.")),
    Layout(
        "`_checkpoint_wrapped_module.`, `_fsdp_wrapped_module.`",
        "FSDP",
        renamed(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    ),
    Layout(
        "`.lora_A.default.weight`",
        "a `state_dict` that PEFT has not saved",
        renamed(r"(lora_[AB])\.weight", r"\1.default.weight"),
    ),
    Layout("one module per output", "Tinker", parts, "exact, folded"),
    Layout("one tensor per fused layer", "verl with Megatron, SGLang", coarse, "exact, split"),
    Layout("`lora_down`, `lora_up`, `alpha`", "kohya-ss, diffusers", kohya),
    Layout("MLX-LM's file and configuration", "MLX-LM", mlx),
    Layout("`adapter_model.bin`", "PEFT without safetensors", in_file("adapter_model.bin")),
    Layout("`adapter_model.pt`", "own scripts", in_file("adapter_model.pt")),
    Layout(
        "a sharded file",
        "`save_pretrained` of a large adapter",
        in_file("adapter_model-0000{}-of-00002.safetensors"),
    ),
    Layout(
        "`pytorch_lora_weights.safetensors`",
        "diffusers",
        in_file("pytorch_lora_weights.safetensors"),
    ),
    Layout("Megatron-LM's own names", "Megatron-LM, NeMo", megatron, "", "Megatron-Bridge"),
    Layout("DoRA", "PEFT", changed(nothing, use_dora=True), "", "DoRA"),
    Layout("a bias of LoRA-B", "PEFT, `lora_bias`", changed(adding("lora_B.bias", 4)), "", "bias"),
    Layout("a trained bias", "PEFT, `bias`", changed(adding("bias", 4), bias="all"), "", "bias"),
    Layout("X-LoRA", "PEFT", changed(nothing, peft_type="XLORA"), "", "peft_type"),
    Layout("Arrow", "PEFT", changed(nothing, arrow_config={"top_k": 2}), "", "arrow_config"),
    Layout(
        "PiSSA, OLoRA, CorDA, LoftQ",
        "PEFT",
        changed(nothing, init_lora_weights="pissa"),
        "",
        "init_lora_weights",
    ),
    Layout(
        "activated LoRA", "PEFT", changed(nothing, alora_invocation_tokens=[1]), "", "aLoRA|alora"
    ),
    Layout(
        "replicated layers",
        "PEFT",
        changed(nothing, layer_replication=[[0, 1]]),
        "",
        "layer_replication",
    ),
)

#: Layouts of experts by their name in ``expert_files.build_files`` -> (layout, producer), for the table.
EXPERTS = {
    "apart": (
        "one module per expert and projection",
        "PEFT on transformers 4, Tinker, Megatron-Bridge",
    ),
    "apart, w1 to w3": ("the same, named w1, w2, w3", "PEFT on Mixtral with transformers 4"),
    "PEFT 0.19": ("`experts.base_layer` and `experts`, stacked", "PEFT 0.19 and later"),
    "PEFT 0.18": ("the same with columns and rows swapped", "PEFT up to 0.18"),
    "Tinker": ("`w1`, `w2`, `w3` with three dimensions", "Tinker's archives"),
    "Megatron-Bridge in memory": (
        "`experts.gate_up_proj` and `experts.down_proj` with three dimensions",
        "Megatron-Bridge in memory",
    ),
    "A stacked, B apart": ("one matrix that all experts share", "Megatron-Bridge, shared outer"),
    "Unsloth before 1269": (
        "stacked, LoRA-B ordered by expert (with the [setting](#experts))",
        "Unsloth up to September 2026",
    ),
    "Megatron-Bridge packed": (
        "the same, swapped (with the [setting](#experts))",
        "Megatron-Bridge, packed experts",
    ),
}

#: ``peft_type`` or setting -> how it becomes plain LoRA; ``test_variants.py`` tests each against PEFT.
FOLDED = {
    "ADALORA": "A times E, scaled by `lora_alpha` over `init_r`",
    "VERA": "both vectors multiplied into the shared matrices, rank r",
    "LOHA": "a product of both factors, rank r²",
    "LOKR": "a Kronecker product; the rank must be at most 512",
    "use_bdlora": "blocks laid on the diagonal, rank r",
    "use_qalora": "A's columns repeated per group, rank r",
    "velora_config": "its training buffer left out",
    "use_rslora": "vLLM applies it itself",
    "rank_pattern": "each module's own rank and scaling, on every release",
}
