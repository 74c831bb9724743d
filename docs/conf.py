"""How the documentation site is built: `make docs`.

The source folder is the repository itself, so that a link from one Markdown file to another, or to a picture, is the
same relative path on a Git host and on the site. Nothing is fetched, neither while it is built nor by its pages.
"""

import sys
from pathlib import Path

import steepest

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "steepest"
author = "the steepest developers"
version = release = steepest.__version__

root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "results/*/README.md"]
exclude_patterns = [".*", "build", "out", "src", "tests", "examples"]
extensions = ["myst_parser", "plain", "public", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
highlight_language = "none"
smartquotes_action = "D"  # dashes; quotes are left alone, as they often are those of an option's value

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
toc_object_entries_show_parents = "hide"

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!steepest\.)\w+\..*"),  # of other libraries, described on their sites
    ("py:.*", r"Loss"),  # text of an annotation, as it stands in the source
    ("py:.*", r"steepest\.(ranks|anatomy\.sites|batch_size\.curve_fit)\..*"),  # of fields that nobody writes
]

html_theme = "furo"
html_title = "steepest"
html_show_copyright = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_show_sphinx = False
html_additional_pages = {"index": "forward.html"}
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "
