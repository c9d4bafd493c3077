# lit-vapo in a container.
#
#   GPU:  docker build -t lit-vapo .
#   CPU:  docker build -t lit-vapo --build-arg TORCH=cpu .
#   Run:  docker run --rm --gpus all -v "$PWD/runs:/workspace/runs" lit-vapo ppo fit --config configs/ppo/….yaml
#
# Behind a proxy or a package mirror, pass pip's own settings as build arguments (PIP_INDEX_URL, PIP_CERT, …).
# Settings that hold a password go in a secret, which stays out of the image:
#   docker build --secret id=pip_conf,src=$HOME/.config/pip/pip.conf .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build

# cuda: the newest torch that pyproject.toml admits, with CUDA libraries. cpu: the pin of constraints-cpu.txt.
ARG TORCH=cuda
# The index torch's CPU build comes from, in addition to pip's own. Empty where pip's own index has CPU builds.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src

# The dependencies change seldom and weigh gigabytes: they get a layer of their own, before any of our code.
COPY pyproject.toml constraints-cpu.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    case "$TORCH" in \
        cpu) cp constraints-cpu.txt constraints.txt ;; \
        cuda) grep -v '^torch==' constraints-cpu.txt > constraints.txt ;; \
        *) echo "TORCH: expected cuda or cpu, got $TORCH" >&2; exit 1 ;; \
    esac \
    && python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && if [ "$TORCH" = cpu ] && [ -n "$TORCH_INDEX" ]; then \
        pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt torch; \
    fi \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY lit_vapo lit_vapo
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-deps .


FROM python:${PYTHON_VERSION}-slim

LABEL org.opencontainers.image.title="lit-vapo" \
      org.opencontainers.image.description="Reward-model ensembles and variance-aware PPO on Lightning" \
      org.opencontainers.image.licenses="Apache-2.0"

# The home folder is open to any user, so that `docker run --user "$(id -u):$(id -g)"` can write its caches.
RUN useradd --create-home --uid 1000 vapo \
    && mkdir -p /workspace/runs \
    && chown -R vapo:vapo /workspace \
    && chmod 1777 /home/vapo /workspace /workspace/runs

COPY --from=build /opt/venv /opt/venv
COPY --chown=vapo:vapo configs /workspace/configs

ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/vapo \
    HF_HOME=/home/vapo/huggingface \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

WORKDIR /workspace
USER 1000
ENTRYPOINT ["lit-vapo"]
CMD ["--help"]
