"""What happens around a gateway's life: exit, fork, backup."""
