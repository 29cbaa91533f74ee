"""The site: Sphinx reads the repository from its root, so that pages link to each other as they do in a clone."""

from docutils import nodes
from lightning.pytorch import Callback

import lightning_compress

project = html_title = "lightning_compress"
version = release = lightning_compress.__version__
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "docs/_build", "lightning_compress", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_inline_tabs"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # hooks have their documentation in Lightning
autodoc_typehints = "description"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]  # sends visitors of the root to docs/index.html
html_copy_source = False
html_show_copyright = False

TORCH = "https://docs.pytorch.org/docs/stable"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable/api"
# Intersphinx would fetch inventories, and the build needs no network.
ELSEWHERE = {
    "torch.Tensor": f"{TORCH}/tensors.html",
    "torch.nn.modules.module.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "nn.Module": f"{TORCH}/generated/torch.nn.Module.html",
    "torch.nn.utils.prune.BasePruningMethod": f"{TORCH}/generated/torch.nn.utils.prune.BasePruningMethod.html",
    "torch.optim.optimizer.Optimizer": f"{TORCH}/optim.html",
    "torch.compile": f"{TORCH}/generated/torch.compile.html",
    "lightning.pytorch.core.module.LightningModule": f"{LIGHTNING}/lightning.pytorch.core.LightningModule.html",
    "lightning.pytorch.trainer.trainer.Trainer": f"{LIGHTNING}/lightning.pytorch.trainer.trainer.Trainer.html",
    "ModelCheckpoint": f"{LIGHTNING}/lightning.pytorch.callbacks.ModelCheckpoint.html",
}
HOOKS = f"{LIGHTNING}/lightning.pytorch.callbacks.Callback.html#lightning.pytorch.callbacks.Callback"


def link_elsewhere(app, env, node, text):
    """Link names of torch and Lightning, the hooks of its callbacks too."""
    name = node.get("reftarget", "")
    address = f"{HOOKS}.{name}" if name in vars(Callback) else ELSEWHERE.get(name)
    return nodes.reference("", "", text, refuri=address, internal=False) if address else None


def setup(app):
    app.connect("missing-reference", link_elsewhere)
