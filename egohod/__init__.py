"""EgoHOD: video-language pretraining on the fine-grained dynamics of hands and objects."""
