module ftvirt.org/ftvirt

go 1.26
