"""A small server that answers as vLLM does, with a tiny model of its own; it can be told to go wrong."""

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from services import QuietHandler, loopback
from transformers import AutoModelForCausalLM, AutoTokenizer


class StandIn:
    """A server's state; attributes say how it goes wrong.

    Attributes:
        max_lora_rank: Adapters of a higher rank are refused; `None` for a server without adapters.
        keeps_old: Says that it has taken new weights, and goes on with the first it was given.
        raw: Log-probabilities are those before the temperature.
        stale_name: Names the first adapter as what it sampled with.
        drops: So many requests for responses are hung up on.
        dead: Hangs up on everything.
        slow: Seconds before a response.
        shift: Added to every token of a text.
        cut: Responses have at most so many tokens.
        finish: Reason to say in place of the true one.
    """

    def __init__(self, model, max_model_len=128, max_lora_rank=16, dev=True, **wrong):
        self.path, self.max_model_len, self.max_lora_rank, self.dev = str(model), max_model_len, max_lora_rank, dev
        self.keeps_old = self.raw = self.stale_name = self.dead = False
        self.drops = self.slow = self.shift = 0
        self.cut = self.finish = None
        vars(self).update(wrong)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.adapters, self.first, self.version = {}, None, "default"
        self.asked, self.loaded, self.lock, self.address = [], [], threading.Lock(), ""

    def answer(self, path, body):
        """Status and what is said; `None` to hang up."""
        known = {"/health": dict, "/v1/models": self.models, "/weight_info": lambda: {"weight_version": self.version}}
        if path in known:
            return 200, known[path]()
        with self.lock:
            return getattr(self, path.removeprefix("/v1").strip("/"), self.missing)(body)

    def missing(self, body):
        return 404, {"detail": "Not Found"}

    def models(self):
        base = {"id": "base", "root": self.path, "parent": None, "max_model_len": self.max_model_len}
        adapters = [{"id": name, "root": path, "parent": "base"} for name, (path, _) in self.adapters.items()]
        return {"object": "list", "data": [*adapters, base]}

    def tokenize(self, body):
        ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
        return 200, {"count": len(ids), "tokens": [i + self.shift for i in ids]}

    def load_lora_adapter(self, body):
        if self.max_lora_rank is None:
            return self.missing(body)
        rank = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            message = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return 500, {"error": {"message": message}}
        fresh = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        lm = PeftModel.from_pretrained(fresh, body["lora_path"])
        self.first = self.first or (body["lora_name"], lm)
        self.adapters[body["lora_name"]] = body["lora_path"], self.first[1] if self.keeps_old else lm
        self.loaded.append(body["lora_path"])
        return 200, {}

    def unload_lora_adapter(self, body):
        return (200, {}) if self.adapters.pop(body["lora_name"], None) else self.missing(body)

    def collective_rpc(self, body):
        if not self.dev:
            return self.missing(body)
        assert body["method"] == "reload_weights"
        self.loaded.append(body["kwargs"]["weights_path"])
        if not self.keeps_old:
            self.base = AutoModelForCausalLM.from_pretrained(self.loaded[-1], dtype=torch.float32)
        return 200, {"results": [None]}

    def reset_prefix_cache(self, body):
        return 200, {}

    def update_weight_version(self, body):
        self.version = body["new_version"]
        return 200, {}

    def completions(self, body):
        self.asked.append(body)
        if self.drops:
            self.drops -= 1
            return None
        lm = self.base if body["model"] == "base" else self.adapters[body["model"]][1]
        choices = [self.choice(lm, body, j) for j in range(body["n"])]
        name = self.first[0] if self.stale_name and body["model"] != "base" else body["model"]
        return 200, {"object": "text_completion", "model": name, "choices": choices[::-1]}

    @torch.no_grad()
    def choice(self, lm, body, number):
        """One response, token by token."""
        random = torch.Generator().manual_seed(body["seed"] + number)
        ids, said, reason = list(body["prompt"]), [], "length"
        start = len(ids)
        for place in range(min(body["max_tokens"], self.cut or 10**6)):
            logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].float()
            if place < body["min_tokens"]:
                logits[body["stop_token_ids"]] = -torch.inf
            shaped = (logits / body["temperature"]).log_softmax(-1)
            ids.append(int(torch.multinomial(shaped.exp(), 1, generator=random)))
            said.append(float((logits.log_softmax(-1) if self.raw else shaped)[ids[-1]]))
            text = self.tokenizer.decode(ids[start:])
            if ids[-1] in body["stop_token_ids"] or any(s in text for s in body["stop"]):
                reason = "stop"
                break
        logprobs = {"token_logprobs": said, "tokens": []}
        reason = self.finish or reason
        return {"index": number, "token_ids": ids[start:], "finish_reason": reason, "logprobs": logprobs, "text": ""}


@contextmanager
def stand_in(model, **wrong):
    """A server on the loopback for the length of a block."""
    state = StandIn(model, **wrong)

    class Handler(QuietHandler):
        def do_GET(self):  # noqa: N802, as the library names it
            self.reply(None)

        def do_POST(self):  # noqa: N802
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body):
            if state.slow and self.path.endswith("completions"):
                time.sleep(state.slow)
            answered = None if state.dead else state.answer(self.path, body)
            if answered is None:
                return
            raw = json.dumps(answered[1]).encode()
            try:
                self.send_response(answered[0])
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                pass

    with loopback(Handler, waits=False) as state.address:
        yield state
