"""The bundled miniature: the weights of a small Wan (`model/`) and the words it was trained on."""
