"""How a policy's weights get into a vLLM server, and how it is known which it has."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from lit_vapo.models.policy import Policy, Role
from lit_vapo.models.vllm_client import VllmClient


class ServedWeights:
    """The weights that a server has of one run.

    An adapter is offered under a name with its version, and no name is used twice: a response says by its name which
    weights it is of, and nothing that the server keeps of prompts under older weights (its prefix cache goes by names)
    can pass for those of newer ones. Whole weights take the base's place, and the server is told a version to keep with
    them.

    Args:
        client: Talks to the server.
        base: Name of the base that it offers.
        folder: Where weights are handed over.
        run: Tells the names of this run from those of others.
        timeout: Longest wait for whole weights, in seconds.
    """

    def __init__(self, client: VllmClient, base: str, folder: Path, run: str, timeout: float) -> None:
        self.client = client
        self.base = base
        self.folder = folder
        self.run = run
        self.timeout = timeout
        self.version: int | None = None
        self.whole = self.serves_reference = False

    def name(self, version: int) -> str:
        """What the server calls weights of a version."""
        return f"policy-{self.run}-v{version}"

    def model(self, role: Role) -> str:
        """The model to ask for."""
        assert self.version is not None
        return self.base if role == "reference" or self.whole else self.name(self.version)

    def bring(self, policy: Policy, version: int, first: bool) -> None:
        """Give the server the weights of a version, unless it has them.

        Args:
            policy: Whose they are.
            version: Their version.
            first: Whether this process is the one that does it.

        Raises:
            ValueError: The server does not take them, or says that it has others.
        """
        if version == self.version:
            return
        self.whole = policy.lora_rank is None
        # What learns in full takes the base's place in the server, and what starts elsewhere never had it.
        self.serves_reference = not self.whole and policy.reference_lm is None
        if first:
            path = self.folder / f"v{version}"
            shutil.rmtree(path, ignore_errors=True)
            try:
                policy.save_pretrained(path)
                if self.whole:
                    self._load_whole(path, version)
                else:
                    self._load_adapter(path, version, policy.lora_rank)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            if self.version is not None:
                shutil.rmtree(self.folder / f"v{self.version}", ignore_errors=True)
        self.version = version

    def _load_adapter(self, path: Path, version: int, rank: int | None) -> None:
        name = self.name(version)
        try:
            self.client.load_adapter(name, str(path))
        except ValueError as error:
            if not self.client.ready():
                raise
            raise ValueError(
                f"model.generator: expected a server that takes an adapter of rank {rank} (model.lora.rank) from "
                f"{path}: started with --enable-lora, a --max-lora-rank of that or more and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and with that folder in its reach; got {error}"
            ) from None
        roots = {model.id: model.root for model in self.client.models() if model.parent is not None}
        if roots.get(name) != str(path):
            raise ValueError(
                f"model.generator: expected {name} from {path} on the server, got {roots or 'no adapters'}"
            )
        if self.version is not None:
            self._forget(self.name(self.version))

    def _load_whole(self, path: Path, version: int) -> None:
        try:
            self.client.load_weights(str(path), self.name(version))
        except ValueError as error:
            if not self.client.ready():
                raise
            raise ValueError(
                f"model.generator: expected a server that takes whole weights from {path}: started with "
                f"VLLM_SERVER_DEV_MODE=1, and with that folder in its reach; got {error}"
            ) from None

    def version_of(self, models: set[str], role: Role) -> int | None:
        """The version of the weights that responses are of, by what the server says; `None` for the base.

        Args:
            models: What it says that it sampled with.
            role: Who was asked.

        Raises:
            ValueError: It names what is none of this run's weights.
        """
        asked = {self.model(role)}
        if models != asked:
            raise ValueError(f"model.generator: expected responses of {asked}, got those of {models}")
        if role == "reference":
            return None
        name = self.client.weights() if self.whole else self.model(role)
        start = self.name(0)[:-1]
        number = name.removeprefix(start)
        if not name.startswith(start) or not number.isdecimal():
            raise ValueError(f"model.generator: expected weights {start}N of this run on the server, got {name!r}")
        return int(number)

    def close(self) -> None:
        """Have the server forget the adapter, if it is there, and remove what was handed over."""
        if self.version is not None:
            if not self.whole and self.client.ready():
                self._forget(self.name(self.version))
            shutil.rmtree(self.folder / f"v{self.version}", ignore_errors=True)
        self.version = None

    def _forget(self, name: str) -> None:
        # A server that was started anew knows nothing of it.
        with suppress(ValueError):
            self.client.unload_adapter(name)
