"""All kinds of inputs."""

from tests.generated import anything, checkpoints, ensembles, options, parquet, policies, prompts, reading, yaml_files

MODULES = (reading, anything, prompts, parquet, yaml_files, options, ensembles, policies, checkpoints)
KINDS = [kind for module in MODULES for kind in module.KINDS]
