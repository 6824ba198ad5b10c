"Self-supervised learning on medical tissue images: the names that are promised to stay. Their types are in `__init__.pyi`."
__version__ = "0.1.0"

_PLACES = {"TileStore": "data.store", "open_store": "data.store", "embed": "evaluate.folder", "predict": "evaluate.folder",
           "load_encoder": "models.encoders", "export_timm": "models.weights", "import_encoder": "models.weights", "load_params": "params"}
__all__ = list(_PLACES)


def __getattr__(name:str):
    "A promised name from its module, read when it is asked for: no import statement here, or every stage would depend on all of them."
    if name not in _PLACES: raise AttributeError(f"module 'sdmae' has no attribute {name!r}; the names promised are {', '.join(__all__)}")
    return getattr(__import__(f"sdmae.{_PLACES[name]}", fromlist=[name]), name)


def __dir__(): return sorted([*globals(), *__all__])
