"""What runs under which strategy: what the tests run, what is refused, and the table of both in the docs."""

# Kinds of PPO by strategy (`sharded_worker.py`), and of the other stages (`several_worker.py`).
PPO = {
    "ddp": ["lora_critic", "full_own", "8bit", "4bit"],
    "fsdp2": ["lora_critic", "lora_own", "full_own", "rloo", "members", "4bit"],
    "tensor": ["lora_critic", "full_own"],
    "both": ["lora_critic", "full_own"],
}
OTHERS = ["sft_lora", "sft_full", "heads", "heads_trained", "lora", "full"]
TESTED, REFUSED, NOT_RUN = "tested", "refused", "not run"
COLUMNS = {
    "LoRA": "lora_critic",
    "LoRA, 8 bit": "8bit",
    "LoRA, 4 bit": "4bit",
    "all weights": "full_own",
    "all weights, reference in 8 or 4 bit": "full_quantised",
    "LoRA members on the base": "members",
    "reward and sft stages": "others",
    "vLLM": "vllm",
}
ROWS = {
    "one device": "alone",
    "`ddp`": "ddp",
    "`fsdp2`": "fsdp2",
    "`fsdp2`, tensor parallel": "tensor",
    "`fsdp2`, both": "both",
    "DeepSpeed, Lightning's FSDP": "deepspeed",
}
# Each with a test of its message; of the reward stage where members or backbones are trained.
REFUSALS = {
    ("fsdp2", "8bit"),
    *((strategy, kind) for strategy in ("tensor", "both") for kind in ("8bit", "4bit", "members", "vllm")),
    ("fsdp2", "vllm"),
    *(("deepspeed", kind) for kind in COLUMNS.values()),
}
# Where other tests run it.
ELSEWHERE = {
    **{("alone", kind): TESTED for kind in COLUMNS.values()},
    ("ddp", "others"): TESTED,
    ("fsdp2", "others"): TESTED,
    ("tensor", "others"): "sft not run, reward refused",
    ("both", "others"): "sft not run, reward refused",
    ("fsdp2", "full_quantised"): "8 bit refused, 4 bit not run",
    ("tensor", "full_quantised"): REFUSED,
    ("both", "full_quantised"): REFUSED,
    ("ddp", "vllm"): TESTED,
}


def cell(strategy, kind):
    """What is known of a kind under a strategy."""
    if (strategy, kind) in REFUSALS:
        return REFUSED
    if kind in PPO.get(strategy, ()):
        return TESTED
    return ELSEWHERE.get((strategy, kind), NOT_RUN)


def table():
    """The table in Markdown."""
    lines = [f"| strategy | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, strategy in ROWS.items():
        lines.append(f"| {name} | {' | '.join(cell(strategy, kind) for kind in COLUMNS.values())} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
