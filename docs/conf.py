"""The site: `scripts/docs.sh` builds it from these pages, with Sphinx, MyST and the theme Furo.

People also read the pages as Markdown, where they lie. So they use plain links, fences and formulas only, and the site
adds what Markdown cannot: `docs/extension.py` says how. Nothing is fetched, neither to build the site nor to view it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

project = "rlhf_jax"
author = "The rlhf_jax maintainers"
copyright = author
html_title = "rlhf_jax"
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton", "extension"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
master_doc = "index"
nitpicky = False
show_warning_types = True
highlight_language = "none"
default_role = "code"

myst_enable_extensions = ["dollarmath", "attrs_block", "colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
myst_dmath_double_inline = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_use_index = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {
        "color-brand-primary": "#1f5f8b",
        "color-brand-content": "#1f5f8b",
        "font-stack--monospace": "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace",
    },
    "dark_css_variables": {"color-brand-primary": "#8fc3ea", "color-brand-content": "#8fc3ea"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
