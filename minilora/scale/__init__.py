"""What is larger than a laptop: real models, several processes, serving; and the doctor."""
