from .data.store import TileStore as TileStore, open_store as open_store
from .evaluate.folder import embed as embed, predict as predict
from .models.encoders import load_encoder as load_encoder
from .models.weights import export_timm as export_timm, import_encoder as import_encoder
from .params import load_params as load_params

__version__: str
