import argparse, logging
from pathlib import Path
import torch
from retouch.train.autoencoder import build, train_autoencoder
from retouch.train.data import Source
from retouch.train.loop import Stage
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
torch.manual_seed(0)
vae = build()
train_autoencoder(vae, Source(Path("/work/data")), Stage("autoencoder", 5500, 4e-4, 7, sheet_every=500), Path("/work/train"), torch.device("cpu"))
