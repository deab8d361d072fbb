# The skeleton enclave: one thread, no SDK, position independent.
#
#   as -mlfence-after-load=yes -mlfence-before-ret=shl -o skeleton.o skeleton.S
#   objcopy -O binary -j .text skeleton.o skeleton.bin
#   objdump -d -w -M intel skeleton.o > skeleton.lst
#
# The two options put an LFENCE behind every load and before every RET (load value injection, INTEL-SA-00334). There is no
# indirect branch but the one that a debug operation is made for.
#
# Entry, as __vdso_sgx_enter_enclave passes registers through:
#   rdi, rsi   request: address (a multiple of 8), size in bytes (a multiple of 8, 16 to 8192)
#   rdx, r8    response: address (a multiple of 8), capacity in bytes (a multiple of 8, at least 16)
# Exit:
#   rdi        status, as in the response's header
#   rsi        bytes of the response's payload
#   rbx, rbp, rsp, r12-r15, MXCSR and the x87 control word are the caller's, every other register is cleared
#
# Request:  u32 operation, u32 payload size, u64 zero, payload.   Response: u32 status, u32 payload size, u64 zero, payload.
# Both lie in ordinary memory. It is read once, and written once, in whole quadwords: unaligned or shorter accesses could
# let stale data through (INTEL-SA-00615, INTEL-SA-00657).

        .intel_syntax noprefix
        .text

# Where everything lies, from the enclave's base. __init__.py says the same.
        .equ    DATA, 0x1000                    # one page
        .equ    INPUT, 0x2000                   # two pages
        .equ    OUTPUT, 0x4000                  # two pages
        .equ    STACK_TOP, 0x8000               # one page; 0x6000 is not there, so that an overflow faults
        .equ    SSA, 0x8000                     # two frames of one page; the TCS follows
        .equ    ENCLAVE_SIZE, 0x10000

        .equ    KEYREQUEST, DATA                # 512 bytes, so aligned
        .equ    TARGETINFO, DATA + 0x200        # 512 bytes, so aligned
        .equ    REPORT, DATA + 0x400            # 432 bytes, aligned to 512
        .equ    REPORTDATA, DATA + 0x600        # 64 bytes, aligned to 128
        .equ    KEY, DATA + 0x640               # 16 bytes, so aligned
        .equ    HASHKEY, DATA + 0x650           # GHASH's H, byte-reversed
        .equ    TAGMASK, DATA + 0x660           # E(K, J0)
        .equ    COUNTER, DATA + 0x670           # the counter block
        .equ    BLOCK, DATA + 0x680             # a block that is not full
        .equ    ROUNDKEYS, DATA + 0x690         # 11 * 16 bytes
        .equ    SCRATCH, KEYREQUEST             # wiped after each operation: up to here
        .equ    SCRATCH_END, DATA + 0x740
        .equ    STATE, DATA + 0x800             # 0 until INIT
        .equ    INSTANCE, DATA + 0x810          # 16 random bytes, drawn by INIT
        .equ    CALLS, DATA + 0x820             # entries since INIT
        .equ    SAVED, DATA + 0x880             # the caller's registers
        .equ    SAVED_RSP, SAVED
        .equ    SAVED_RBP, SAVED + 8
        .equ    SAVED_R12, SAVED + 16
        .equ    SAVED_R13, SAVED + 24
        .equ    SAVED_R14, SAVED + 32
        .equ    SAVED_R15, SAVED + 40
        .equ    SAVED_MXCSR, SAVED + 48
        .equ    SAVED_FCW, SAVED + 52
        .equ    EXIT_TO, SAVED + 56
        .equ    RESPONSE, SAVED + 64
        .equ    CAPACITY, SAVED + 72
        .equ    REQUEST_SIZE, SAVED + 80
        .equ    RESPONSE_SIZE, SAVED + 88

        .equ    HEADER, 16
        .equ    MAX_REQUEST, 8192
        .equ    MAX_PAYLOAD, 8192 - HEADER
        .equ    TAG, 16
        .equ    SEAL_HEADER, 512 + 16           # KEYREQUEST, u32 data size, 12 bytes IV

        .equ    ENCLU_EREPORT, 0
        .equ    ENCLU_EGETKEY, 1
        .equ    ENCLU_EEXIT, 4

        .equ    OP_INIT, 1
        .equ    OP_ECHO, 2
        .equ    OP_REPORT, 3
        .equ    OP_SEAL, 4
        .equ    OP_UNSEAL, 5
        .equ    OP_INFO, 6
        .equ    OP_DEBUG, 128                   # the first that needs ATTRIBUTES.DEBUG
        .equ    OP_UD2, 128
        .equ    OP_PEEK, 129
        .equ    OP_POKE, 130
        .equ    OP_JUMP, 131
        .equ    OP_SPIN, 132

        .equ    S_OK, 0
        .equ    S_REQUEST, 1
        .equ    S_OPERATION, 2
        .equ    S_STATE, 3
        .equ    S_SIZE, 4
        .equ    S_RANDOM, 5
        .equ    S_KEY, 6
        .equ    S_AUTHENTICATION, 7
        .equ    S_DEBUG, 8
        .equ    S_EXCEPTION, 9
        .equ    S_BUFFER, 10

# GPRSGX at the end of an SSA frame (SDM 38.9.2), EXITINFO of #UD (38.9.2.1).
        .equ    GPRSGX, 4096 - 184
        .equ    GPRSGX_RIP, 136
        .equ    GPRSGX_EXITINFO, 160
        .equ    EXITINFO_UD, 0x80000306

image:
entry:
        test    rax, rax                        # CSSA: not zero when an exception was not yet handled
        jnz     exception
        lfence
        mov     [rip + image + SAVED_RSP], rsp
        mov     [rip + image + SAVED_RBP], rbp
        mov     [rip + image + EXIT_TO], rcx
        lea     rsp, [rip + image + STACK_TOP]
        push    0                               # DF, AC, NT and the like are the caller's: not here
        popfq
        mov     [rip + image + SAVED_R12], r12
        mov     [rip + image + SAVED_R13], r13
        mov     [rip + image + SAVED_R14], r14
        mov     [rip + image + SAVED_R15], r15
        stmxcsr [rip + image + SAVED_MXCSR]
        fnstcw  [rip + image + SAVED_FCW]
        fninit
        ldmxcsr [rip + mxcsr]
        mov     qword ptr [rip + image + REQUEST_SIZE], 0

        # The response first: without it there is nowhere to complain to but rdi.
        mov     r12, rdi
        mov     r13, rsi
        mov     rax, rdx
        mov     rcx, r8
        call    outside
        jc      no_response
        cmp     r8, HEADER
        jb      no_response
        mov     [rip + image + RESPONSE], rdx
        mov     [rip + image + CAPACITY], r8

        mov     rax, r12
        mov     rcx, r13
        call    outside
        jc      bad_request
        cmp     r13, HEADER
        jb      bad_request
        cmp     r13, MAX_REQUEST
        ja      bad_request
        lfence
        mov     [rip + image + REQUEST_SIZE], r13
        mov     rsi, r12
        lea     rdi, [rip + image + INPUT]
        mov     rcx, r13
        shr     rcx, 3
        rep     movsq                           # the one read: from here on only this copy counts
        lfence

        mov     ebx, [rip + image + INPUT]      # operation
        mov     r14d, [rip + image + INPUT + 4] # payload size
        cmp     qword ptr [rip + image + INPUT + 8], 0
        jne     bad_request
        sub     r13, HEADER
        mov     rax, r14
        add     rax, 7
        and     rax, -8
        cmp     rax, r13
        jne     bad_request
        lfence

        # From here on: ebx operation, r13 its payload, r14 the payload's size.
        lea     r13, [rip + image + INPUT + HEADER]
        cmp     ebx, OP_INIT
        je      op_init
        cmp     qword ptr [rip + image + STATE], 1
        jne     bad_state
        inc     qword ptr [rip + image + CALLS]
        cmp     ebx, OP_ECHO
        je      op_echo
        cmp     ebx, OP_REPORT
        je      op_report
        cmp     ebx, OP_SEAL
        je      op_seal
        cmp     ebx, OP_UNSEAL
        je      op_unseal
        cmp     ebx, OP_INFO
        je      op_info
        cmp     ebx, OP_DEBUG
        jb      bad_operation

        call    self_report
        test    byte ptr [rip + image + REPORT + 48], 2         # ATTRIBUTES.DEBUG
        jz      not_debug
        lfence
        cmp     ebx, OP_UD2
        je      op_ud2
        cmp     ebx, OP_PEEK
        je      op_peek
        cmp     ebx, OP_POKE
        je      op_poke
        cmp     ebx, OP_JUMP
        je      op_jump
        cmp     ebx, OP_SPIN
        je      op_spin

bad_operation:
        mov     edi, S_OPERATION
        jmp     fail
bad_request:
        mov     edi, S_REQUEST
        jmp     fail
bad_state:
        mov     edi, S_STATE
        jmp     fail
bad_size:
        mov     edi, S_SIZE
        jmp     fail
bad_random:
        mov     edi, S_RANDOM
        jmp     fail
bad_key:
        mov     [rip + image + OUTPUT + HEADER], eax    # why, in EGETKEY's words
        mov     edi, S_KEY
        mov     esi, 4
        jmp     finish
bad_tag:
        mov     edi, S_AUTHENTICATION
        jmp     fail
not_debug:
        mov     edi, S_DEBUG
        jmp     fail

# Ends with status edi and no payload.
fail:
        xor     esi, esi

# Ends with status edi and esi bytes of payload, which lie at OUTPUT + HEADER.
finish:
        mov     r12d, edi
        mov     r13d, esi
        lea     rcx, [r13 + HEADER + 7]
        and     rcx, -8
        mov     [rip + image + RESPONSE_SIZE], rcx
        cmp     rcx, [rip + image + CAPACITY]
        jbe     1f
        mov     r12d, S_SIZE
        xor     r13d, r13d
        mov     ecx, HEADER
1:      lfence
        mov     [rip + image + OUTPUT], r12d
        mov     [rip + image + OUTPUT + 4], r13d
        mov     qword ptr [rip + image + OUTPUT + 8], 0
        shr     rcx, 3
        lea     rsi, [rip + image + OUTPUT]
        mov     rdi, [rip + image + RESPONSE]
        rep     movsq                           # the one write

        # No secret of an operation outlives it.
        xor     eax, eax
        lea     rdi, [rip + image + OUTPUT]
        mov     rcx, [rip + image + RESPONSE_SIZE]
        shr     rcx, 3
        rep     stosq
        jmp     wipe
no_response:
        mov     r12d, S_BUFFER
        xor     r13d, r13d
        xor     eax, eax
wipe:
        lea     rdi, [rip + image + INPUT]
        mov     rcx, [rip + image + REQUEST_SIZE]
        shr     rcx, 3
        rep     stosq
        lea     rdi, [rip + image + SCRATCH]
        mov     ecx, (SCRATCH_END - SCRATCH) / 8
        rep     stosq
        lea     rdi, [rip + image + STACK_TOP - 64]
        mov     ecx, 8
        rep     stosq

        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        pxor    xmm\n, xmm\n
        .endr
        fninit
        fldcw   [rip + image + SAVED_FCW]
        ldmxcsr [rip + image + SAVED_MXCSR]
        mov     edi, r12d
        mov     esi, r13d
        mov     r12, [rip + image + SAVED_R12]
        mov     r13, [rip + image + SAVED_R13]
        mov     r14, [rip + image + SAVED_R14]
        mov     r15, [rip + image + SAVED_R15]
        mov     rbx, [rip + image + EXIT_TO]
        mov     rbp, [rip + image + SAVED_RBP]
        mov     rsp, [rip + image + SAVED_RSP]
leave:
        xor     ecx, ecx
        xor     edx, edx
        xor     r8d, r8d
        xor     r9d, r9d
        xor     r10d, r10d
        xor     r11d, r11d                      # and the flags are those of a zero
        mov     eax, ENCLU_EEXIT
        enclu
        ud2                                     # EEXIT does not return

# An entry above an SSA frame in use. No stack and no memory but that frame is touched. The fault that OP_UD2 makes on
# purpose is repaired, so that ERESUME goes on behind it; nothing else is ours to repair.
exception:
        mov     rbx, rcx
        cmp     rax, 1
        jne     1f
        lfence
        lea     rdx, [rip + image + SSA + GPRSGX]
        cmp     dword ptr [rdx + GPRSGX_EXITINFO], EXITINFO_UD
        jne     1f
        lea     rax, [rip + deliberate]
        cmp     [rdx + GPRSGX_RIP], rax
        jne     1f
        lea     rax, [rip + repaired]
        mov     [rdx + GPRSGX_RIP], rax
        xor     edi, edi
        xor     esi, esi
        jmp     leave
1:      mov     edi, S_EXCEPTION
        xor     esi, esi
        jmp     leave

# INIT: draws the instance's name. Out: 16 bytes.
op_init:
        test    r14, r14
        jnz     bad_request
        cmp     qword ptr [rip + image + STATE], 0
        jne     bad_state
        lea     rdi, [rip + image + INSTANCE]
        mov     ecx, 2
        call    random
        jnc     bad_random
        mov     qword ptr [rip + image + STATE], 1

# INFO: out: the instance's name (16 bytes), u64 entries since INIT.
op_info:
        test    r14, r14
        jnz     bad_request
        movdqa  xmm0, [rip + image + INSTANCE]
        movdqa  [rip + image + OUTPUT + HEADER], xmm0
        mov     rax, [rip + image + CALLS]
        mov     [rip + image + OUTPUT + HEADER + 16], rax
        mov     esi, 24
        xor     edi, edi
        jmp     finish

# ECHO: out: the payload.
op_echo:
        mov     rsi, r13
        lea     rdi, [rip + image + OUTPUT + HEADER]
        mov     ecx, r14d
        call    copy
        mov     esi, r14d
        xor     edi, edi
        jmp     finish

# REPORT: TARGETINFO (512 bytes), REPORTDATA (64). Out: REPORT (432).
op_report:
        cmp     r14d, 512 + 64
        jne     bad_request
        lfence
        mov     rsi, r13
        lea     rdi, [rip + image + TARGETINFO]
        mov     ecx, 512
        call    copy
        lea     rdi, [rip + image + REPORTDATA]
        mov     ecx, 64
        call    copy
        call    ereport
        lea     rsi, [rip + image + REPORT]
        lea     rdi, [rip + image + OUTPUT + HEADER]
        mov     ecx, 432
        call    copy
        mov     esi, 432
        xor     edi, edi
        jmp     finish

# SEAL: u32 policy (1 MRENCLAVE, 2 MRSIGNER), u32 size of the additional data, additional data, data.
# Out: KEYREQUEST (512 bytes), u32 size of the data, IV (12), ciphertext, tag (16).
# AES-128-GCM; what is authenticated is KEYREQUEST, size, IV, then the additional data.
op_seal:
        cmp     r14d, 8
        jb      bad_request
        lfence
        mov     r15d, [r13]                     # policy
        lea     eax, [r15 - 1]
        cmp     eax, 1
        ja      bad_request
        mov     ebp, [r13 + 4]                  # size of the additional data
        sub     r14d, 8
        cmp     ebp, r14d
        ja      bad_request
        sub     r14d, ebp                       # size of the data
        cmp     r14d, MAX_PAYLOAD - SEAL_HEADER - TAG
        ja      bad_size
        lfence
        call    self_report
        lea     rdi, [rip + image + KEYREQUEST]
        mov     word ptr [rdi], 4               # KEYNAME: SEAL
        mov     [rdi + 2], r15w                 # KEYPOLICY
        mov     ax, [rip + image + REPORT + 258]
        mov     [rdi + 4], ax                   # ISVSVN
        movdqa  xmm0, [rip + image + REPORT]
        movdqu  [rdi + 8], xmm0                 # CPUSVN
        movdqu  xmm0, [rip + attribute_mask]
        movdqu  [rdi + 24], xmm0                # ATTRIBUTEMASK
        add     rdi, 40                         # KEYID
        mov     ecx, 4
        call    random
        jnc     bad_random
        mov     eax, [rip + misc_mask]
        mov     [rip + image + KEYREQUEST + 72], eax
        lea     rsi, [rip + image + KEYREQUEST]
        lea     rdi, [rip + image + OUTPUT + HEADER]
        mov     ecx, 512
        call    copy
        call    egetkey
        jnz     bad_key
        lea     rdi, [rip + image + OUTPUT + HEADER + 512]
        mov     ecx, 2
        call    random                          # IV, and four bytes that the size replaces
        jnc     bad_random
        mov     [rip + image + OUTPUT + HEADER + 512], r14d

        lea     r12, [rip + image + OUTPUT + HEADER]
        call    gcm_begin
        lea     rsi, [r13 + 8]
        mov     ecx, ebp
        call    ghash
        lea     rsi, [r13 + rbp + 8]
        lea     rdi, [r12 + SEAL_HEADER]
        mov     ecx, r14d
        call    gcm_counter
        lea     rsi, [r12 + SEAL_HEADER]
        mov     ecx, r14d
        call    ghash
        call    gcm_tag
        lea     rdi, [r12 + r14 + SEAL_HEADER]
        movdqu  [rdi], xmm0
        lea     esi, [r14 + SEAL_HEADER + TAG]
        xor     edi, edi
        jmp     finish

# UNSEAL: u32 zero, u32 size of the additional data, additional data, what SEAL gave. Out: the data.
op_unseal:
        cmp     r14d, 8 + SEAL_HEADER + TAG
        jb      bad_request
        cmp     dword ptr [r13], 0
        jne     bad_request
        mov     ebp, [r13 + 4]                  # size of the additional data
        sub     r14d, 8 + SEAL_HEADER + TAG
        cmp     ebp, r14d
        ja      bad_request
        sub     r14d, ebp                       # size of the data
        lfence
        lea     r12, [r13 + rbp + 8]            # the sealed data
        cmp     [r12 + 512], r14d
        jne     bad_request
        # A key that depends on neither identity, or on other attributes, is one that others have too.
        mov     eax, [r12]
        ror     eax, 16                         # KEYPOLICY low, KEYNAME high
        sub     eax, 0x40001
        cmp     eax, 1
        ja      bad_request
        movdqu  xmm0, [r12 + 24]
        movdqu  xmm1, [rip + attribute_mask]
        pcmpeqb xmm0, xmm1
        pmovmskb eax, xmm0
        cmp     eax, 0xffff
        jne     bad_request
        mov     eax, [r12 + 72]
        cmp     eax, [rip + misc_mask]
        jne     bad_request
        # What SEAL leaves zero has to be: EGETKEY faults at reserved bytes, and a fault ends the thread.
        cmp     word ptr [r12 + 6], 0
        jne     bad_request
        cmp     dword ptr [r12 + 76], 0
        jne     bad_request
        lea     rsi, [r12 + 80]
        mov     ecx, (512 - 80) / 8
1:      cmp     qword ptr [rsi], 0
        jne     bad_request
        add     rsi, 8
        dec     ecx
        jnz     1b
        lfence
        mov     rsi, r12
        lea     rdi, [rip + image + KEYREQUEST]
        mov     ecx, 512
        call    copy
        call    egetkey
        jnz     bad_key
        call    gcm_begin
        lea     rsi, [r13 + 8]
        mov     ecx, ebp
        call    ghash
        lea     rsi, [r12 + SEAL_HEADER]
        mov     ecx, r14d
        call    ghash
        call    gcm_tag
        lea     rsi, [r12 + r14 + SEAL_HEADER]
        movdqu  xmm1, [rsi]
        pcmpeqb xmm0, xmm1                      # all sixteen bytes, whatever they are
        pmovmskb eax, xmm0
        cmp     eax, 0xffff
        jne     bad_tag
        lfence
        lea     rsi, [r12 + SEAL_HEADER]
        lea     rdi, [rip + image + OUTPUT + HEADER]
        mov     ecx, r14d
        call    gcm_counter
        mov     esi, r14d
        xor     edi, edi
        jmp     finish

# UD2: faults; the exception entry repairs it. Out: 8 bytes, 1 if it was repaired.
op_ud2:
        xor     eax, eax
deliberate:
        ud2
        jmp     1f
repaired:
        mov     eax, 1
1:      mov     [rip + image + OUTPUT + HEADER], rax
        mov     esi, 8
        xor     edi, edi
        jmp     finish

# PEEK: u64 address. Out: the 8 bytes there.
op_peek:
        cmp     r14d, 8
        jne     bad_request
        mov     rax, [r13]
        mov     rax, [rax]
        mov     [rip + image + OUTPUT + HEADER], rax
        mov     esi, 8
        xor     edi, edi
        jmp     finish

# POKE: u64 address, u64 value, which is stored there.
op_poke:
        cmp     r14d, 16
        jne     bad_request
        mov     rax, [r13]
        mov     rcx, [r13 + 8]
        mov     [rax], rcx
        xor     esi, esi
        xor     edi, edi
        jmp     finish

# JUMP: u64 address to which the enclave jumps.
op_jump:
        cmp     r14d, 8
        jne     bad_request
        push    [r13]
        ret

# SPIN: u64 rounds, u64 pattern, which fills registers meanwhile. Out: u64 sum of pattern, one per round.
op_spin:
        cmp     r14d, 16
        jne     bad_request
        mov     rcx, [r13]
        mov     rax, [r13 + 8]
        .irp    r, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r14, r15
        mov     \r, rax
        .endr
        movq    xmm0, rax
        punpcklqdq xmm0, xmm0
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
        movdqa  xmm\n, xmm0
        .endr
        xor     eax, eax
        test    rcx, rcx
        jz      2f
1:      add     rax, rdx
        dec     rcx
        jnz     1b
2:      mov     [rip + image + OUTPUT + HEADER], rax
        mov     esi, 8
        xor     edi, edi
        jmp     finish

# Carry set unless the rcx bytes at rax are aligned to 8, a multiple of 8, and wholly outside of the enclave.
outside:
        mov     r9, rax
        or      r9, rcx
        test    r9, 7
        jnz     1f
        mov     r9, rax
        add     r9, rcx                         # end
        jc      1f
        lea     r10, [rip + image]
        cmp     r9, r10
        jbe     2f
        add     r10, ENCLAVE_SIZE
        cmp     rax, r10
        jae     2f
1:      stc
        ret
2:      lfence
        clc
        ret

# Copies ecx bytes from rsi to rdi; both end behind the copy.
copy:
        mov     eax, ecx
        shr     ecx, 3
        rep     movsq
        mov     ecx, eax
        and     ecx, 7
        rep     movsb
        ret

# Stores ecx random quadwords at rdi. Carry clear if the processor has none. Intel: ten attempts are enough for one.
random:
        mov     edx, 10
1:      rdrand  rax
        jc      2f
        dec     edx
        jnz     1b
        clc
        ret
2:      stosq
        dec     ecx
        jnz     random
        stc
        ret

# REPORT of this enclave for nobody: where it learns its own attributes and security versions.
self_report:
        xor     eax, eax
        lea     rdi, [rip + image + TARGETINFO]
        mov     ecx, 64
        rep     stosq
        lea     rdi, [rip + image + REPORTDATA]
        mov     ecx, 8
        rep     stosq
ereport:
        push    rbx
        lea     rbx, [rip + image + TARGETINFO]
        lea     rcx, [rip + image + REPORTDATA]
        lea     rdx, [rip + image + REPORT]
        mov     eax, ENCLU_EREPORT
        enclu
        pop     rbx
        ret

# The key for KEYREQUEST, expanded. Zero flag clear if the processor refuses.
egetkey:
        lea     rbx, [rip + image + KEYREQUEST]
        lea     rcx, [rip + image + KEY]
        mov     eax, ENCLU_EGETKEY
        enclu
        test    eax, eax
        jnz     1f
        movdqa  xmm0, [rip + image + KEY]
        lea     rdi, [rip + image + ROUNDKEYS]
        movdqa  [rdi], xmm0
        .irp    rcon, 0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36
        aeskeygenassist xmm1, xmm0, \rcon
        call    expand
        .endr
        xor     eax, eax
1:      ret

# The next round key from xmm0 and AESKEYGENASSIST's xmm1.
expand:
        pshufd  xmm1, xmm1, 0xff
        .rept   3
        movdqa  xmm2, xmm0
        pslldq  xmm2, 4
        pxor    xmm0, xmm2
        .endr
        pxor    xmm0, xmm1
        add     rdi, 16
        movdqa  [rdi], xmm0
        ret

# AES-128 of xmm0.
encrypt:
        lea     rax, [rip + image + ROUNDKEYS]
        pxor    xmm0, [rax]
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9
        aesenc  xmm0, [rax + \n * 16]
        .endr
        aesenclast xmm0, [rax + 160]
        ret

# Begins GCM (NIST SP 800-38D) for the sealed data at r12: H, J0, and GHASH (xmm15) over the header.
gcm_begin:
        pxor    xmm0, xmm0
        call    encrypt
        pshufb  xmm0, [rip + reverse]
        movdqa  [rip + image + HASHKEY], xmm0
        mov     rax, [r12 + 516]
        mov     [rip + image + COUNTER], rax
        mov     eax, [r12 + 524]
        mov     [rip + image + COUNTER + 8], eax
        mov     dword ptr [rip + image + COUNTER + 12], 0x01000000
        movdqa  xmm0, [rip + image + COUNTER]
        call    encrypt
        movdqa  [rip + image + TAGMASK], xmm0
        pxor    xmm15, xmm15
        mov     rsi, r12
        mov     ecx, SEAL_HEADER

# GHASH over ecx bytes at rsi, the last block filled with zeros.
ghash:
        sub     ecx, 16
        jb      1f
        movdqu  xmm0, [rsi]
        add     rsi, 16
        call    ghash_block
        jmp     ghash
1:      add     ecx, 16
        jz      2f
        pxor    xmm0, xmm0
        movdqa  [rip + image + BLOCK], xmm0
        lea     rdi, [rip + image + BLOCK]
        rep     movsb
        movdqa  xmm0, [rip + image + BLOCK]
        call    ghash_block
2:      ret

# The lengths (header and additional data: ebp, data: r14) close GHASH. Out: the tag in xmm0.
gcm_tag:
        lea     rax, [rbp + SEAL_HEADER]
        shl     rax, 3
        bswap   rax
        movq    xmm0, rax
        lea     rax, [r14 * 8]
        bswap   rax
        movq    xmm1, rax
        punpcklqdq xmm0, xmm1
        call    ghash_block
        movdqa  xmm0, xmm15
        pshufb  xmm0, [rip + reverse]
        pxor    xmm0, [rip + image + TAGMASK]
        ret

# Encrypts or decrypts ecx bytes from rsi to rdi, counting from J0 + 1.
gcm_counter:
        mov     edx, 1
1:      test    ecx, ecx
        jz      3f
        inc     edx
        mov     eax, edx
        bswap   eax
        mov     [rip + image + COUNTER + 12], eax
        movdqa  xmm0, [rip + image + COUNTER]
        call    encrypt
        cmp     ecx, 16
        jb      2f
        movdqu  xmm1, [rsi]
        pxor    xmm0, xmm1
        movdqu  [rdi], xmm0
        add     rsi, 16
        add     rdi, 16
        sub     ecx, 16
        jmp     1b
2:      lfence
        movdqa  [rip + image + BLOCK], xmm0
        lea     r9, [rip + image + BLOCK]
        mov     al, [rsi]
        xor     al, [r9]
        mov     [rdi], al
        .irp    n, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14
        cmp     ecx, \n
        je      3f
        mov     al, [rsi + \n]
        xor     al, [r9 + \n]
        mov     [rdi + \n], al
        .endr
3:      ret

# xmm15 = (xmm15 + the block in xmm0) * H in GCM's field, on byte-reversed operands: a carry-less product of 256 bits, one
# bit to the left because GCM's bits are reflected, then the remainder by x^128 + x^7 + x^2 + x + 1.
ghash_block:
        pshufb  xmm0, [rip + reverse]
        pxor    xmm0, xmm15
        movdqa  xmm1, [rip + image + HASHKEY]
        movdqa  xmm2, xmm0
        pclmulqdq xmm2, xmm1, 0x00              # low
        movdqa  xmm3, xmm0
        pclmulqdq xmm3, xmm1, 0x11              # high
        movdqa  xmm4, xmm0
        pclmulqdq xmm4, xmm1, 0x01
        pclmulqdq xmm0, xmm1, 0x10
        pxor    xmm4, xmm0                      # middle
        movdqa  xmm0, xmm4
        pslldq  xmm0, 8
        psrldq  xmm4, 8
        pxor    xmm2, xmm0
        pxor    xmm3, xmm4
        movdqa  xmm4, xmm2                      # [xmm3:xmm2] <<= 1
        movdqa  xmm5, xmm3
        pslld   xmm2, 1
        pslld   xmm3, 1
        psrld   xmm4, 31
        psrld   xmm5, 31
        movdqa  xmm6, xmm4
        pslldq  xmm4, 4
        pslldq  xmm5, 4
        psrldq  xmm6, 12
        por     xmm2, xmm4
        por     xmm3, xmm5
        por     xmm3, xmm6
        movdqa  xmm4, xmm2                      # reduce the low half into the high one
        movdqa  xmm5, xmm2
        movdqa  xmm6, xmm2
        pslld   xmm4, 31
        pslld   xmm5, 30
        pslld   xmm6, 25
        pxor    xmm4, xmm5
        pxor    xmm4, xmm6
        movdqa  xmm5, xmm4
        pslldq  xmm4, 12
        psrldq  xmm5, 4
        pxor    xmm2, xmm4
        movdqa  xmm4, xmm2
        movdqa  xmm6, xmm2
        movdqa  xmm7, xmm2
        psrld   xmm4, 1
        psrld   xmm6, 2
        psrld   xmm7, 7
        pxor    xmm4, xmm6
        pxor    xmm4, xmm7
        pxor    xmm4, xmm5
        pxor    xmm2, xmm4
        pxor    xmm3, xmm2
        movdqa  xmm15, xmm3
        ret

        .balign 16
reverse:
        .quad   0x08090a0b0c0d0e0f, 0x0001020304050607
attribute_mask:                                 # INIT, DEBUG and the bits that Intel reserves; any XFRM
        .quad   0xff0000000000000b, 0
misc_mask:
        .long   0xf0000000
mxcsr:
        .long   0x1f80                          # all exceptions masked
        .balign 4096, 0
