#!/usr/bin/env bash
# Build the image for a CPU, and run the tiny pipeline in it as a user without a name, on a read-only root: `make image`.
# With docker or podman, or with buildah as root; without one of them, or without the base image, it says so and is done.
#
#   IMAGE_FLAGS='--build-arg PIP_INDEX_URL=… --secret id=pip_cert,src=…'    further words for the build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME=lit-vapo:image-test
NOBODY=12345:12345
read -ra flags <<<"${IMAGE_FLAGS:-}"
flags+=(--build-arg TORCH=cpu --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null || echo unknown)")

skip() {
    printf 'image: not built: %s\n' "$1"
    exit 0
}

# The first engine that answers.
engine() {
    if docker info >/dev/null 2>&1; then
        echo docker
    elif podman info >/dev/null 2>&1; then
        echo podman
    elif command -v buildah >/dev/null && [[ $EUID == 0 ]]; then
        echo buildah
    fi
}

# In a container's own mounts: its root read-only, with what Docker mounts into one. Arguments: the root, then its
# environment up to a `--`, then a command.
confined() {
    local root=$1 environment=()
    shift
    while [[ $1 != -- ]]; do
        environment+=("$1")
        shift
    done
    shift
    mount --bind "$root" "$root"
    mount -t tmpfs -o mode=1777,nosuid,nodev,noexec tmpfs "$root/tmp"
    mount -t tmpfs -o mode=1777 tmpfs "$root/cache"
    mount -t tmpfs -o mode=1777 tmpfs "$root/workspace/runs"
    mkdir "$root/tmp/tests"
    mount --bind tests "$root/tmp/tests"
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount -o remount,ro,bind "$root"
    cd "$root"
    # shellcheck disable=SC2016
    exec env -i "${environment[@]}" chroot --userspec="$NOBODY" "$root" sh -c 'cd /workspace && exec "$@"' sh "$@"
}
if [[ ${1:-} == --confined ]]; then
    confined "${@:2}"
fi


engine=$(engine)
[[ -n $engine ]] || skip 'there is no docker, podman or buildah (as root) that answers'
base=$(sed -n 's/^ARG PYTHON_VERSION=\(.*\)/python:\1-slim-bookworm/p' Dockerfile)
if [[ $engine == buildah ]]; then
    export BUILDAH_ISOLATION=chroot
    built=(buildah images --quiet "docker.io/library/$base")
    pull=(timeout 300 buildah pull --quiet "docker.io/library/$base")
    flags=(--format docker "${flags[@]}")
else
    built=("$engine" image inspect "$base")
    pull=(timeout 300 "$engine" pull --quiet "$base")
fi
"${built[@]}" >/dev/null 2>&1 || "${pull[@]}" >/dev/null 2>&1 || skip "$base cannot be pulled"

seconds=$SECONDS
"$engine" build "${flags[@]}" -t "$NAME" .
printf 'image: built by %s in %d s\n' "$engine" $((SECONDS - seconds))

inside=(tini -- python /tmp/tests/image/pipeline.py)
seconds=$SECONDS
if [[ $engine == buildah ]]; then
    container=$(buildah from --pull-never "localhost/$NAME")
    trap 'buildah rm "$container" >/dev/null' EXIT
    root=$(buildah mount "$container")
    mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep '=')
    du -sh "$root" | sed 's/\t.*/ unpacked/; s/^/image: /'
    unshare --mount --pid --fork bash "$0" --confined "$root" "${environment[@]}" PYTHONPATH=/tmp/tests -- "${inside[@]}"
else
    "$engine" image inspect --format 'image: {{.Size}} bytes' "$NAME"
    "$engine" run --rm --read-only --tmpfs /tmp --user "$NOBODY" --shm-size 1g -v "$PWD/tests:/tmp/tests:ro" \
        -e PYTHONPATH=/tmp/tests --entrypoint "${inside[0]}" "$NAME" "${inside[@]:1}"
fi
printf 'image: the tiny pipeline ran in %d s\n' $((SECONDS - seconds))
