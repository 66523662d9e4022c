"""Sphinx settings."""

from importlib.metadata import version as installed_version

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import beam_runner
import drjax.plan
import federated

project = "drjax"
author = "The drjax authors"
copyright = "2026, The drjax authors"
release = version = installed_version("drjax")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Docstrings put code between single backticks, as Markdown does.
default_role = "code"

autodoc_typehints_format = "short"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"drjax {release}"


def find_undocumented(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of each public name that no page documents."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    modules = (drjax, drjax.plan, beam_runner, federated, federated.datasets)
    for module in modules:
        for name in module.__all__:
            # `Plan` is public in two modules, and documented in one.
            home = getattr(getattr(module, name), "__module__", None)
            if documented.isdisjoint({f"{module.__name__}.{name}", f"{home}.{name}"}):
                logging.getLogger(__name__).warning(
                    "%s.%s is on no page", module.__name__, name
                )


def setup(app: Sphinx) -> None:
    app.connect("env-check-consistency", find_undocumented)
