"""Configure everything in YAML. This runs configure_by_yaml.yaml; the command line does the same:

    lightning-compress fit --config examples/configure_by_yaml.yaml

Run it with `python examples/configure_by_yaml.py`; arguments override the file, such as `--trainer.max_epochs=2`.
"""

import sys

from lightning_compress.cli import main

main(["fit", "--config", "examples/configure_by_yaml.yaml", *sys.argv[1:]])
