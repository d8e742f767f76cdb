/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A guest that is its own firmware and stays in real mode, so that any KVM runs
 * it: it counts, writes to 64 pages in turn, and prints its number each 4096 turns.
 */
.code16
.globl _start
_start:
	cli
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %ss
	movw $0x7000, %sp
	xorl %ebx, %ebx
next:
	incl %ebx
	/* segment 0x2000 + (ebx & 63) * 0x100 */
	movl %ebx, %eax
	andl $63, %eax
	shll $8, %eax
	addl $0x2000, %eax
	movw %ax, %es
	movl %ebx, %es:16
	testl $0xfff, %ebx
	jnz next
	movl %ebx, %ecx
	movw $8, %si
digit:
	roll $4, %ecx
	movb %cl, %al
	andb $15, %al
	addb $48, %al
	cmpb $58, %al
	jb 1f
	addb $39, %al
1:	call putc
	decw %si
	jnz digit
	movb $10, %al
	call putc
	jmp next
putc:
	pushw %ax
	movw $0x3fd, %dx
2:	inb %dx, %al
	testb $0x20, %al
	jz 2b
	popw %ax
	movw $0x3f8, %dx
	outb %al, %dx
	ret
.org 0xfff0
	jmp _start
.org 0x10000
