"""The room of pictures: images decoded, drawings made of plain data; it knows no model and no torch."""
