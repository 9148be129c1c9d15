import autotunenet_jax

project = "AutoTuneNet"
author = "The AutoTuneNet authors"
copyright = "The AutoTuneNet authors"
release = version = autotunenet_jax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"AutoTuneNet {release}"

autodoc_mock_imports = ["ray"]  # an extra that building the pages does without
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a state appear once, as autodoc finds them
napoleon_custom_sections = [("Cost", "params_style"), "Source"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
