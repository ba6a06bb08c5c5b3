"""What pyproject.toml cannot say: README for PyPI, whose relative links lead to the repository.

REPOSITORY is the repository's address, which CI sets. Without it README stays as it is.
"""

import os
import re
from pathlib import Path

from setuptools import setup

repository = os.environ.get("REPOSITORY")
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
urls = {}
if repository:
    urls = {"Source": repository, "Issues": f"{repository}/issues"}
    branch = os.environ.get("GITHUB_REF_NAME", "main")  # a release's tag
    readme = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{repository}/raw/{branch}/", readme)
    readme = re.sub(r"(\]\()(?!https?:|#)", rf"\1{repository}/blob/{branch}/", readme)

setup(long_description=readme, long_description_content_type="text/markdown", project_urls=urls)
