"""The stages of training, a LightningModule each."""
