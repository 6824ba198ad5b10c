from .vit import *
from .vit import save_encoder as _s, load_encoder as _l
from pathlib import Path
def load_encoder(folder, *a, **k):
    f=Path(folder); return _l(f/"encoder" if (f/"encoder").is_dir() else f, *a, **k)
save_encoder=_s
