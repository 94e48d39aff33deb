"""Where the packages lie: `kernels/` and `training/` stand at the top but install inside
`autodeco_fast`.

They carry no `__init__.py`, because a top-level package named `kernels` would shadow the Hugging
Face package of that name which transformers imports. Links `autodeco_fast/kernels` and
`autodeco_fast/training` make them importable in place; a wheel holds real files. Everything else is
in pyproject.toml.
"""

from setuptools import setup

setup(
    packages=[
        "autodeco_fast",
        "autodeco_fast.autodeco",
        "autodeco_fast.cli",
        "autodeco_fast.demo",
        "autodeco_fast.demo.serve",
        "autodeco_fast.generation",
        "autodeco_fast.losses",
        "autodeco_fast.ops",
        "autodeco_fast.policies",
        "autodeco_fast.serving",
        "autodeco_fast.torch_backend",
        "autodeco_fast.kernels",
        "autodeco_fast.training",
    ],
    package_dir={"autodeco_fast.kernels": "kernels", "autodeco_fast.training": "training"},
    package_data={
        "autodeco_fast": ["py.typed"],
        "autodeco_fast.demo": ["model/*", "heads/*/*"],
        "autodeco_fast.demo.serve": ["page/*"],
    },
    include_package_data=False,
)
