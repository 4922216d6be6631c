"""What the games look like: playing cards, street views, cities. numpy and Pillow only."""
