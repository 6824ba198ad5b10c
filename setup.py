"Package metadata: everything stands in settings.ini, as nbdev 2 has it."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf8")
cfg = ini["DEFAULT"]

extras = {k: cfg[f"{k}_requirements"].split() for k in ("pipeline", "notebooks", "dev", "natural", "slides", "bench")}
extras["notebooks"] += extras["pipeline"] # a notebook is edited, then `dvc repro` runs it
extras["dev"] += extras["notebooks"] + extras["slides"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf8") if Path(__file__).with_name("README.md").exists() else "",
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"], "console_scripts": ["sdmae=sdmae.cli:main"]},
    package_data={cfg["lib_path"]: ["py.typed", "*.pyi"]},
    include_package_data=True,
    zip_safe=False,
)
